"""`analyze`'s report: figures, report.html and report.md in the folder of its results."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sparsify_vlm.analysis.results import Results, remove_others
from sparsify_vlm.files import write_atomically
from sparsify_vlm.report.analysis import distance_figures, figures
from sparsify_vlm.report.analysis.conclusions import conclusions, implications
from sparsify_vlm.report.analysis.page import Page, Section, write_html, write_markdown
from sparsify_vlm.report.analysis.sections import SECTIONS, everything
from sparsify_vlm.report.analysis.style import to_png

FIGURES = figures.FIGURES | distance_figures.FIGURES
NEEDS_TOKENS = (
    "This is an analysis of the weights alone. With a dataset or an activation store it would also "
    "have: the ablation (experiment 2), norms divided by the scale σ of each target, shares of "
    "what is written on tokens, averages weighted by activity, dead latents by their firing, and "
    "everything by token role."
)
REFERENCES = (
    "Ameisen et al. 2025, Circuit Tracing: Revealing Computational Graphs in Language Models "
    "(transformer-circuits.pub/2025/attribution-graphs/methods.html).",
    "Gemma Scope 2 (huggingface.co/google/gemma-scope-2-1b-pt); the numbers in the column of that "
    "name are those of a study of its CLT with plain norms, before any of the corrections here.",
)


def write_report(results: Results, folder: Path) -> Path:
    """Draw all figures and write report.html, then report.md; returns the HTML file."""
    pictures = write_figures(FIGURES, results, folder)
    page = build(results)
    write_html(page, pictures, folder / "report.html")
    write_markdown(page, pictures, folder / "report.md")
    return folder / "report.html"


def write_figures(drawing: Mapping[str, Any], results: Any, folder: Path) -> dict[str, bytes]:
    """Those figures of `drawing` that there are numbers for, as PNG files; returns their bytes."""
    drawn = {name: draw(results) for name, draw in drawing.items()}
    pictures = {name: to_png(figure) for name, figure in drawn.items() if figure is not None}
    place = folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_atomically(place / f"{name}.png", partial(_write, content))
    remove_others(place, [f"{name}.png" for name in pictures])
    return pictures


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def build(results: Results) -> Page:
    """The report of one coder."""
    coder = results.provenance.get("coder", {})
    sections = [SECTIONS[name](results) for name in results.experiments]
    lacking = [] if results.provenance.get("data") else [NEEDS_TOKENS]
    sections += [
        Section("Conclusions", groups=conclusions(results), notes=[_how_to_read(), *lacking]),
        Section("Implications for circuit analysis", points=implications(results)),
        everything(results),
        Section("References", points=REFERENCES),
    ]
    return Page(
        f"Cross-layer connections of {Path(str(coder.get('path', 'a CLT'))).name}",
        "How much do the cross-layer connections of this transcoder matter, and what do they do?",
        sections,
        facts_of(results),
    )


def _how_to_read() -> str:
    return (
        "Sentences above follow from the numbers by fixed rules: a direction is named where the "
        "95 % interval lies on one side, “no evidence” is said where it does not. Intervals hold "
        "for one trained coder: they cover other samples or other source layers, not another "
        "training run. Plain: as published for other coders. Corrected: unchanged when a latent is "
        "scaled up and its decoders down, so that it writes the same."
    )


def facts_of(results: Results) -> list[tuple[str, str]]:
    """What was measured, on what, as names and text."""
    p = results.provenance
    coder, data = p.get("coder", {}), p.get("data")
    facts = [("Coder", f"{coder.get('path')} ({coder.get('format')})")] if coder else []
    if coder:
        shape = (
            f"{coder['n_layers']} layers, {coder['num_latents']} latents a layer of width "
            f"{coder['d_model']}, at most {coder['n_targets']} targets each, {coder['activation']}"
        )
        shape += f", k = {coder['k']}" if coder["k"] != coder["num_latents"] else ""
        facts += [("Shape", shape), ("Model", str(coder.get("model") or "not stated"))]
    facts.append(("Tokens", tokens_text(data)))
    if p.get("plt"):
        facts.append(("Per-layer transcoder", str(p["plt"])))
    if p.get("fit_activations"):
        facts.append(("Decoders refitted on", str(p["fit_activations"])))
    if p.get("versions"):
        facts.append(("Versions", ", ".join(f"{k} {v}" for k, v in p["versions"].items())))
    facts += [("Warning", str(text)) for text in p.get("warnings", [])]
    return facts


def tokens_text(data: Mapping[str, Any] | None) -> str:
    """ "600 samples of shapes (heldout): 38,400 image, 9,000 text tokens"."""
    if not data:
        return "none: weights only"
    counts = [f"{n:,} {role.replace('_', ' ')}" for role, n in data.get("tokens", {}).items() if n]
    split = f" ({data['split']})" if data.get("split") else ""
    return (
        f"{data.get('samples')} samples of {data.get('source')}{split}: {', '.join(counts)} tokens"
    )
