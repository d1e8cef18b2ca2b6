"""Evaluation figures against two-pass float64 formulas and direct computation."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch

from sparsify_vlm.cli import main
from sparsify_vlm.coders import Clt, CltConfig, save_clt
from sparsify_vlm.data import ShapesDataset
from sparsify_vlm.errors import UserError
from sparsify_vlm.models import Role, load_model, record_tokens
from sparsify_vlm.replacement import Ablation, VLMReplacementModel
from sparsify_vlm.replacement.evaluate import EvaluateConfig, measure
from sparsify_vlm.replacement.measures import AnswerCounts, LayerSums, Predictions, recovered

L, T, D, F, K = 3, 50, 8, 24, 4
ROLES = {"all": None, "image": Role.IMAGE, "text": Role.TEXT}


def random_clt(n_targets=L, offset=0, hookpoints=None, d=D, scale=0.2) -> Clt:
    names = hookpoints or [f"layers.{i}.mlp" for i in range(L)]
    cfg = CltConfig(d, names, num_latents=F, k=K, n_targets=n_targets, target_offset=offset)
    clt = Clt(cfg).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in clt.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return clt


def batch_of_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, T, D, generator=generator)
    y = 100 + torch.randn(L, T, D, generator=generator)  # a mean far from 0
    role = torch.randint(1, 4, (T,), generator=generator, dtype=torch.uint8)
    return x, y, role


@pytest.mark.parametrize("offset", [0, 1])
def test_fvu_l0_and_dead_are_those_of_two_passes_in_float64(offset):
    clt = random_clt(offset=offset)
    parts = [batch_of_tokens(seed) for seed in (1, 2, 3)]
    sums = LayerSums(clt)
    for part in parts:
        sums.add(*part)
    x, y = (torch.cat([p[i] for p in parts], 1).double() for i in (0, 1))
    role = torch.cat([p[2] for p in parts])
    acts = []
    for s in range(L):
        pre = (
            (x[s] @ clt.W_enc[s].double().T + clt.b_enc[s].double()).relu()
            if s < L - offset
            else None
        )
        if pre is not None:
            cut = pre.topk(K, dim=1).values[:, -1:]
            pre = pre * (pre >= cut)
        acts.append(pre)
    for g, group in enumerate(ROLES.values()):
        chosen = torch.ones_like(role, dtype=torch.bool) if group is None else role == group
        for t in range(offset, L):
            for arm in ("full", "same_layer_only"):
                y_hat = clt.b_dec[t].double().expand(len(role), -1)
                for s in range(t - offset + 1):
                    if arm == "full" or s == t - offset:
                        y_hat = y_hat + acts[s] @ clt.W_dec[s][t - offset - s].double()
                error = (y[t] - y_hat)[chosen].square().sum()
                variance = (y[t][chosen] - y[t][chosen].mean(0)).square().sum()
                assert float(sums.fvu(arm)[g, t]) == pytest.approx(
                    float(error / variance), rel=1e-6
                )
        for s in range(L - offset):
            l0 = (acts[s][chosen] > 0).sum(1).double().mean()
            assert float(sums.l0()[g, s]) == pytest.approx(float(l0))
            never = ((acts[s][chosen] > 0).sum(0) == 0).double().mean()
            assert float(sums.dead()[g, s]) == pytest.approx(float(never))
    assert sums.fvu("full")[:, :offset].isnan().all()
    assert sums.dead()[:, L - offset :].isnan().all()
    torch.testing.assert_close(sums.mean_y(), y.mean(1))


def test_a_role_without_tokens_has_no_figures():
    clt, (x, y, role) = random_clt(), batch_of_tokens(1)
    sums = LayerSums(clt)
    sums.add(x, y, torch.full_like(role, Role.TEXT))
    rows = sums.by_group(sums.fvu("full"))
    assert all(row["image"] is None and row["text"] == row["all"] for row in rows)
    assert all(row["image"] is None for row in sums.by_group(sums.l0()))
    assert all(row["image"] is None for row in sums.by_group(sums.dead()))


def test_predictions_are_those_of_plain_sums():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 30, 11, generator=generator).unbind()
    labels = torch.randint(0, 11, (30,), generator=generator)
    found = Predictions()
    for part in (slice(0, 7), slice(7, 30)):
        found.add(q[part], labels[part], p[part].log_softmax(-1))
    ce = kl = same = 0.0
    for i in range(30):
        own = [math.exp(v) for v in p[i].tolist()]
        other = [math.exp(v) for v in q[i].tolist()]
        own, other = ([v / sum(e) for v in e] for e in (own, other))
        ce -= math.log(other[labels[i]])
        kl += sum(a * math.log(a / b) for a, b in zip(own, other, strict=True))
        same += own.index(max(own)) == other.index(max(other))
    assert found.cross_entropy == pytest.approx(ce / 30, rel=1e-5)
    assert found.kl == pytest.approx(kl / 30, rel=1e-5)
    assert found.top1_match == same / 30


def test_a_word_the_model_gives_no_probability_adds_nothing_to_kl():
    log_p = torch.tensor([[0.0, -math.inf]])
    found = Predictions()
    found.add(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]), log_p)
    assert (found.kl, found.cross_entropy) == (0.0, 0.0)


def test_what_is_recovered():
    assert recovered(1.0, 5.0, 1.0) == 1.0
    assert recovered(5.0, 5.0, 1.0) == 0.0
    assert recovered(2.0, 5.0, 1.0) == 0.75
    assert recovered(2.0, 1.0, 1.0) is None  # the ablation does no harm
    assert recovered(None, 5.0, 1.0) is None


def test_answers_by_type():
    counts = AnswerCounts()
    counts.add("colour", True, {"full": True})
    counts.add("colour", True, {"full": False})
    counts.add("count", False, {"full": True})
    assert counts.exact_match("model") == {"all": 2 / 3, "colour": 1.0, "count": 0.0}
    assert counts.exact_match("full") == {"all": 2 / 3, "colour": 0.5, "count": 1.0}
    assert counts.changed_of_correct("full") == {"all": 0.5, "colour": 0.5, "count": None}
    assert counts.n_correct() == {"all": 2, "colour": 2, "count": 0}
    assert AnswerCounts().exact_match("model") is None


# ---- on the embedded model


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-llava", "cpu")


@pytest.fixture(scope="module")
def model(loaded):
    """A coder good enough to keep some answers: decoders zero, biases the mean of y."""
    names = loaded.stack.hookpoints
    clt = random_clt(len(names), hookpoints=names, d=loaded.stack.d_model, scale=0.02)
    return VLMReplacementModel(loaded, clt)


N = 12


@pytest.fixture(scope="module")
def config():
    return EvaluateConfig(clt="somewhere", max_examples=N, batch_size=5)


@pytest.fixture(scope="module")
def figures(model, config):
    return measure(model, config, quiet=True)


def questions(loaded, answered):
    """The same samples, prompted by hand, one at a time."""
    for row in ShapesDataset("heldout", N):
        text = f"USER: <image>\n{row['question']} ASSISTANT:"
        text += f" {row['answer']}</s>" if answered else ""
        yield row, dict(loaded.processor(text=text, images=row["image"], return_tensors="pt"))


def test_predictions_are_scored_at_the_answer_and_its_end(model, figures, loaded):
    sums = {"model": 0.0, "full": 0.0, "same": 0.0, "kl": 0.0}
    scored = 0
    for row, inputs in questions(loaded, answered=True):
        n = len(loaded.tokenizer(f" {row['answer']}</s>", add_special_tokens=False)["input_ids"])
        logits = {"model": loaded.forward(inputs, logits=True).logits}
        logits["full"] = model(**inputs).logits
        logits["same"] = model(Ablation(cross=True), **inputs).logits
        labels = inputs["input_ids"][0, -n:]
        log = {arm: v[0, -n - 1 : -1].double().log_softmax(-1) for arm, v in logits.items()}
        for arm, values in log.items():
            sums[arm] -= float(values[torch.arange(n), labels].sum())
        sums["kl"] += float((log["model"].exp() * (log["model"] - log["full"])).sum())
        scored += n
    assert figures["scored_tokens"] == scored
    base, full = figures["baseline"], figures["replacement"]["full"]
    assert base["cross_entropy"] == pytest.approx(sums["model"] / scored, rel=1e-4, abs=1e-6)
    assert full["cross_entropy"] == pytest.approx(sums["full"] / scored, rel=1e-4)
    assert full["kl"] == pytest.approx(sums["kl"] / scored, rel=1e-4)
    same = figures["replacement"]["same_layer_only"]["cross_entropy"]
    assert same == pytest.approx(sums["same"] / scored, rel=1e-4)


def test_zero_and_mean_ablation_are_those_of_all_mlps_at_once(model, figures, loaded):
    bos = loaded.tokenizer.bos_token_id
    rows = [inputs for _, inputs in questions(loaded, answered=True)]
    y = []
    for inputs in rows:
        table = record_tokens(loaded, inputs)
        y.append(table.y[:, table.input_ids != bos])
    means = torch.cat(y, 1).double().mean(1)
    for name, values in (("zero", torch.zeros_like(means)), ("mean", means)):
        total = count = 0
        for row, inputs in zip(ShapesDataset("heldout", N), rows, strict=True):
            n = len(
                loaded.tokenizer(f" {row['answer']}</s>", add_special_tokens=False)["input_ids"]
            )
            own = {}
            with loaded.stack.reading(lambda i, x, out, own=own: own.update({i: out.clone()})):
                loaded.forward(inputs)
            keep = (inputs["input_ids"] == bos)[..., None]

            # BOS attends to itself alone, so what its MLPs write does not depend on the others.
            def write(i, x, own=own, keep=keep, values=values):
                return torch.where(keep, own[i], values[i].to(x))

            with loaded.stack.replacing(write):
                logits = loaded.forward(inputs, logits=True).logits[0, -n - 1 : -1]
            labels = inputs["input_ids"][0, -n:]
            total -= float(logits.log_softmax(-1)[torch.arange(n), labels].sum())
            count += n
        found = figures["baseline"][f"{name}_ablated_cross_entropy"]
        assert found == pytest.approx(total / count, rel=1e-4)


def test_fvu_is_that_of_the_counted_tokens(model, figures, loaded):
    tables = [record_tokens(loaded, inputs) for _, inputs in questions(loaded, answered=True)]
    counted = [t.input_ids != loaded.tokenizer.bos_token_id for t in tables]
    x, y = (
        torch.cat([getattr(t, n)[:, c] for t, c in zip(tables, counted, strict=True)], 1)
        for n in ("x", "y")
    )
    role = torch.cat([t.role[c] for t, c in zip(tables, counted, strict=True)])
    assert figures["tokens"] == {
        name: int((role == r).sum())
        for name, r in (("image", Role.IMAGE), ("text", Role.TEXT), ("special", Role.SPECIAL))
    }
    assert figures["excluded_tokens"] == N == figures["n_samples"]
    for t, y_hat in enumerate(model.clt.reconstruct(x)):
        for name, group in ROLES.items():
            chosen = torch.ones_like(role, dtype=torch.bool) if group is None else role == group
            target = y[t][chosen].double()
            fvu = (target - y_hat[chosen]).square().sum() / (target - target.mean(0)).square().sum()
            assert figures["layers"][t]["fvu"][name] == pytest.approx(float(fvu), rel=1e-5)


def test_answers_are_those_of_one_prompt_at_a_time(model, figures, loaded):
    right = {"model": {}, "full": {}}
    for row, inputs in questions(loaded, answered=False):
        options = {"max_new_tokens": 8, "do_sample": False}
        own = loaded.model.generate(**inputs, **options)
        spliced = model.generate(**inputs, **options)
        for arm, ids in (("model", own), ("full", spliced)):
            new = ids[0, inputs["input_ids"].shape[1] :].tolist()
            wanted = loaded.tokenizer(f"{row['answer']}</s>", add_special_tokens=False)["input_ids"]
            right[arm].setdefault(row["type"], []).append(new == wanted)
    for arm, found in (("model", figures["baseline"]), ("full", figures["replacement"]["full"])):
        every = [value for values in right[arm].values() for value in values]
        assert found["exact_match"]["all"] == sum(every) / N
        for kind, values in right[arm].items():
            assert found["exact_match"][kind] == sum(values) / len(values)


def test_the_same_twice(model, config, figures):
    assert measure(model, config, quiet=True) == figures


def test_per_layer_coders_have_one_arm(loaded, config):
    names = loaded.stack.hookpoints
    clt = random_clt(1, hookpoints=names, d=loaded.stack.d_model)
    found = measure(VLMReplacementModel(loaded, clt), config, quiet=True)
    assert found["replacement"]["full"] == found["replacement"]["same_layer_only"]
    assert found["mean_fvu"] == found["mean_fvu_same_layer_only"]


def test_without_max_new_tokens_nothing_is_generated(model):
    cfg = EvaluateConfig(clt="x", max_examples=4, max_new_tokens=0)
    found = measure(model, cfg, quiet=True)
    assert found["baseline"]["exact_match"] is None
    assert found["replacement"]["full"]["changed_of_correct"] is None


def test_plain_text_is_scored_from_its_second_token_on(tmp_path):
    loaded = load_model("tiny-llama", "cpu")
    names = loaded.stack.hookpoints
    model = VLMReplacementModel(
        loaded, random_clt(len(names), hookpoints=names, d=loaded.stack.d_model, scale=0.02)
    )
    lines = ["there is a red circle at the top left.", "what colour is the circle?"] * 30
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    cfg = EvaluateConfig(
        clt="x", dataset=str(tmp_path / "text.jsonl"), split="train", ctx_len=32, max_examples=6
    )
    found = measure(model, cfg, quiet=True)
    assert found["scored_tokens"] == 6 * 31
    assert found["baseline"]["exact_match"] is None
    assert found["mean_fvu"]["image"] is None
    assert found["mean_fvu"]["text"] > 0


def test_the_command_writes_json_and_prints_tables(tmp_path, loaded, model, capsys):
    clt = model.clt
    clt.cfg.model = "tiny-llava"
    save_clt(clt, tmp_path / "clt")
    out = tmp_path / "eval.json"
    argv = ["evaluate", str(tmp_path / "clt"), "--max_examples", "8", "--output", str(out)]
    assert main(argv) == 0
    found = json.loads(out.read_text())
    assert (found["format"], found["version"]) == ("sparsify-vlm evaluation", 1)
    assert (found["dataset"], found["split"], found["n_samples"]) == ("shapes", "heldout", 8)
    assert [row["hookpoint"] for row in found["layers"]] == loaded.stack.hookpoints
    printed = capsys.readouterr().out
    for word in ("FVU image", "layers.7.mlp", "CE recovered", "colour", "top-1 match"):
        assert word in printed


def test_where_a_foreign_coder_reads_can_be_said(tmp_path, monkeypatch):
    """circuit-tracer's folder says it, the same coder's in EleutherAI's layout does not."""
    monkeypatch.chdir(tmp_path)
    oracles = Path(__file__).parents[1] / "oracles" / "attribution"
    found = {}
    for name, folder, site in (
        ("known", "clt_circuit_tracer", []),
        ("said", "clt_eleutherai", ["--input_site", "resid_mid"]),
        ("silent", "clt_eleutherai", []),
    ):
        clt, model = oracles / "cases" / "llama_relu" / folder, oracles / "models" / "tiny_llama"
        argv = ["evaluate", str(clt), "shapes", "--model", str(model), "--max_examples", "4"]
        assert main([*argv, *site, "--max_new_tokens", "0", "--output", name]) == 0
        found[name] = json.loads(Path(name).read_text())["mean_fvu"]["all"]
    assert found["said"] == pytest.approx(found["known"], rel=1e-5)
    assert found["silent"] != pytest.approx(found["known"], rel=0.01)
    assert main(["evaluate", str(clt), "--input_site", "nowhere"]) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere/at/all"], "nowhere"),
        (["CLT", "--model", "no/such-model"], "tiny-llava"),
        (["CLT", "--split", "test"], "heldout"),
        (["CLT", "--batch_size", "0"], "--batch_size"),
    ],
)
def test_mistakes_end_in_one_line_and_nothing_is_written(tmp_path, model, capsys, argv, words):
    model.clt.cfg.model = "tiny-llava"
    folder = save_clt(model.clt, tmp_path / "clt")
    out = tmp_path / "eval.json"
    argv = [str(folder) if a == "CLT" else a for a in argv]
    assert main(["evaluate", *argv, "--output", str(out)]) != 0
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("error: ")
    assert words in told
    assert not out.exists()


def test_activations_that_are_not_finite_name_the_layer(loaded, model, config):
    weight = loaded.stack._blocks[3].mlp.down_proj.weight
    saved = weight.clone()
    try:
        weight.data[0, 0] = math.nan
        with pytest.raises(UserError, match=r"output of language_model\.model\.layers\.3\.mlp"):
            measure(model, config, quiet=True)
    finally:
        weight.data.copy_(saved)


def test_only_one_thread_uses_the_tokenizer(model, monkeypatch):
    """Its padding is a state, so a call from another thread would change a batch being made."""
    kind, threads = type(model.loaded.tokenizer), set()
    own = kind._encode_plus

    def noting(self, *args, **kwargs):
        threads.add(threading.current_thread().name)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(kind, "_encode_plus", noting)
    measure(model, EvaluateConfig(clt="x", max_examples=8, batch_size=2), quiet=True)
    assert threads == {"prefetch"}
