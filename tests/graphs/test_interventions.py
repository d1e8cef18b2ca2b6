"""Interventions give circuit-tracer's logits and features, and obey their own definitions."""

from __future__ import annotations

import pytest
import torch
from reference_graphs import inputs, meta, model, oracle

from sparsify_vlm.replacement import Intervention, LocalModel

LISTED = [
    (case, one["key"])
    for case in ("llama_relu", "llama_topk")
    for one in meta(case)["interventions"]
]


@pytest.mark.parametrize(("case", "key"), LISTED)
def test_the_same_logits_and_features(case, key):
    reference = oracle(case)
    one = next(one for one in meta(case)["interventions"] if one["key"] == key)
    wanted = Intervention(one["layer"], one["pos"], one["feature"], one["new"])
    found = model(case).intervene(inputs(case), [wanted], one["mode"])
    torch.testing.assert_close(found.logits, reference[f"{key}.logits"], rtol=0, atol=1e-4)
    values = found.features(reference["active_features"])
    torch.testing.assert_close(values, reference[f"{key}.acts_selected"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["constrained", "freeze_attention", "free"])
def test_setting_a_feature_to_what_it_is_changes_nothing(mode):
    replaced = model("llama_topk")
    local = LocalModel(replaced, inputs("llama_topk"))
    reference = oracle("llama_topk")
    layer, position, index = reference["active_features"][100].tolist()
    value = float(reference["activation_values"][100])
    same = replaced.intervene(local, [Intervention(layer, position, index, value)], mode)
    torch.testing.assert_close(same.logits, reference["hf_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        same.features(reference["active_features"]),
        reference["activation_values"],
        rtol=0,
        atol=1e-4,
    )
