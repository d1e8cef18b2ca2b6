"""`analyze` and `compare`: the experiments of `analysis`, and the reports of `report` about them.

analyze(cfg)     one coder   -> results.json, data/, figures/, report.html, report.md
compare(cfg)     two coders, or two groups of them -> the same files about their differences
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_vlm.analysis.config import AnalyzeConfig, CompareConfig
from sparsify_vlm.errors import UserError

if TYPE_CHECKING:
    from sparsify_vlm.analysis.compare import Comparison
    from sparsify_vlm.analysis.results import Results
    from sparsify_vlm.coders import Clt
    from sparsify_vlm.coders.formats import StoredClt
    from sparsify_vlm.data import ActivationStore
    from sparsify_vlm.data.config import DataConfig


def analyze(
    clt: str | Path | Clt | StoredClt,
    data: str | Path | DataConfig | ActivationStore | None = None,
    only: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    **options: Any,
) -> Results:
    """The cross-layer experiments on one coder.

        results = analyze("checkpoints/t", "shapes")
        results.estimate("fvu_difference.same_only")

    Args:
        clt: a coder's folder or Hub id in any readable format, or one in memory.
        data: tokens to weigh and ablate on: a dataset's name, a `DataConfig`, an activation store
            or its folder. None: from the weights alone.
        only: of weights, ablation, features, distance. Default: all that `data` allows.
        output_dir: folder for report, figures and data; None writes nothing.
        options: other flags of `sparsify-vlm analyze` by name.

    Raises `UserError` for what cannot be used.
    """
    from sparsify_vlm.analysis.analyze import run_experiments

    coder = None if isinstance(clt, (str, Path)) else clt
    flags = _data_flags(data) | options | {"only": list(only or [])}
    cfg = AnalyzeConfig(clt=_name(clt), **flags)
    if output_dir is None:
        return run_experiments(cfg, coder, quiet=True)
    return _analyze_into(replace(cfg, output_dir=str(output_dir)), coder, quiet=True)


def run_analyze(cfg: AnalyzeConfig) -> None:
    """The command `analyze`."""
    folder = cfg.output_dir or str(Path("analysis") / (Path(cfg.clt).name or "clt"))
    results = _analyze_into(replace(cfg, output_dir=folder), None)
    _say(results, Path(folder))


def _analyze_into(
    cfg: AnalyzeConfig, coder: Clt | StoredClt | None, quiet: bool = False
) -> Results:
    """Everything, into `cfg.output_dir`; that it can be written to is checked first."""
    from sparsify_vlm.analysis.analyze import run_experiments
    from sparsify_vlm.analysis.results import FORMAT, check_folder
    from sparsify_vlm.report.analysis.analysis_report import write_report
    from sparsify_vlm.report.figures import need_matplotlib

    need_matplotlib()
    assert cfg.output_dir is not None
    folder = check_folder("--output_dir", cfg.output_dir, FORMAT)
    results = run_experiments(cfg, coder, quiet)
    results.save(folder)
    write_report(results, folder)
    return results


def _name(clt: object) -> str:
    if isinstance(clt, (str, Path)):
        return str(clt)
    model = getattr(clt, "cfg").model  # noqa: B009
    return f"a coder of {model}" if model else "a coder in memory"


def _data_flags(data: str | Path | DataConfig | ActivationStore | None) -> dict[str, Any]:
    """`data` as fields of `AnalyzeConfig`."""
    from sparsify_vlm.data.config import DataConfig

    if data is None:
        return {}
    if isinstance(data, DataConfig):
        return {f.name: getattr(data, f.name) for f in fields(DataConfig)}
    path = data if isinstance(data, (str, Path)) else data.path
    if (Path(path) / "manifest.json").is_file():
        return {"activations": str(path)}
    return {"dataset": str(path)}


def _say(results: Results, folder: Path) -> None:
    """The conclusions and where everything is, on the screen."""
    from textwrap import fill

    from sparsify_vlm.report.analysis.conclusions import conclusions

    for warning in results.provenance.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    for heading, found in conclusions(results).items():
        print(heading)
        for sentence in found:
            print(fill(f"- {sentence}", 100, subsequent_indent="  "))
        print()
    print(f"The report: {(folder / 'report.html').resolve()}")


def compare(
    text_clt: str | Path | Sequence[str | Path],
    vlm_clt: str | Path | Sequence[str | Path],
    output_dir: str | Path | None = None,
    **options: Any,
) -> Comparison:
    """A text model's CLT beside a vision-language model's.

    Args:
        text_clt, vlm_clt: a CLT or a folder that `analyze` wrote; several: one per training seed.
        output_dir: folder for report, figures and data; None writes nothing.
        options: other flags of `sparsify-vlm compare` by name.

    Raises `UserError` for what cannot be used.
    """
    sides = [
        [str(one)] if isinstance(one, (str, Path)) else [str(each) for each in one]
        for one in (text_clt, vlm_clt)
    ]
    cfg = CompareConfig(text=sides[0], vlm=sides[1], **options)
    if output_dir is None:
        return _compared(cfg, quiet=True)
    return _compare_into(replace(cfg, output_dir=str(output_dir)), quiet=True)


def run_compare(cfg: CompareConfig) -> None:
    """The command `compare`."""
    from textwrap import fill

    from sparsify_vlm.report.analysis.comparison_report import conclusions

    found = _compare_into(cfg)
    for sentence in conclusions(found):
        print(fill(f"- {sentence}", 100, subsequent_indent="  "))
    print(f"\nThe report: {(Path(cfg.output_dir) / 'report.html').resolve()}")


def _compare_into(cfg: CompareConfig, quiet: bool = False) -> Comparison:
    from sparsify_vlm.analysis.compare import FORMAT
    from sparsify_vlm.analysis.results import check_folder
    from sparsify_vlm.report.analysis.comparison_report import write_comparison
    from sparsify_vlm.report.figures import need_matplotlib

    need_matplotlib()
    folder = check_folder("--output_dir", cfg.output_dir, FORMAT)
    found = _compared(cfg, quiet)
    write_comparison(found, folder)
    return found


def _compared(cfg: CompareConfig, quiet: bool = False) -> Comparison:
    from sparsify_vlm.analysis.compare import compare_results

    sides = (cfg.text, cfg.text_dataset), (cfg.vlm, cfg.vlm_dataset)
    opened = [[_opened(name, cfg, dataset) for name in names] for names, dataset in sides]
    text, vlm = (
        [_analysed(name, one, cfg, dataset, quiet) for name, one in zip(names, found, strict=True)]
        for (names, dataset), found in zip(sides, opened, strict=True)
    )
    return compare_results(text, vlm, cfg.only)


def _opened(name: str, cfg: CompareConfig, dataset: str | None) -> Results | StoredClt:
    """A folder of `analyze`, read, or a CLT; what cannot be read is refused before any work."""
    from sparsify_vlm.analysis.results import RESULTS, Results
    from sparsify_vlm.coders.formats import open_clt

    if (Path(name) / RESULTS).is_file():
        return Results.load(name)
    if "ablation" in cfg.only and dataset is None:
        raise UserError(
            f"--only ablation measures on tokens, and {name} is a CLT: give --text_dataset and "
            "--vlm_dataset, or folders that analyze wrote"
        )
    return open_clt(name)


def _analysed(
    name: str, one: Results | StoredClt, cfg: CompareConfig, dataset: str | None, quiet: bool
) -> Results:
    """The results; of a CLT, the experiments made now."""
    from sparsify_vlm.analysis.analyze import run_experiments
    from sparsify_vlm.coders.formats import StoredClt

    if not isinstance(one, StoredClt):
        return one
    settings = AnalyzeConfig(
        clt=name,
        dataset=dataset,
        split=cfg.split,
        only=list(cfg.only),
        seed=cfg.seed,
        max_examples=cfg.max_examples,
        device=cfg.device,
        dtype=cfg.dtype,
    )
    return run_experiments(settings, one, quiet)
