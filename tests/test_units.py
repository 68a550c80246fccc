import pytest

from peft_ila.units import split_layer, unit_of


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.3.mlp.up_proj", ("model.layers", 3)),
        ("layers.3.self_attn.q_proj", ("layers", 3)),  # a bare LlamaModel
        ("transformer.h.11.attn.c_attn", ("transformer.h", 11)),
        ("model.decoder.layers.0.fc1", ("model.decoder.layers", 0)),
        ("encoder.block.2.layer.1.DenseReluDense.wo", ("encoder.block", 2)),
        ("model.layers.1.mlp.experts.5.w1", ("model.layers", 1)),
        ("model.vision_tower.encoder.layers.4.fc1", ("model.vision_tower.encoder.layers", 4)),
        ("0.auto_model.encoder.layer.3.attention.self.query", ("0.auto_model.encoder.layer", 3)),
        ("net.2", ("net", 2)),
        ("lm_head", None),
        ("model.embed_tokens", None),
        ("0", None),
        ("layer1.conv2", None),
    ],
)
def test_split_layer(name, expected):
    assert split_layer(name) == expected


def test_unit_of():
    name = "model.layers.3.mlp.up_proj"
    assert unit_of(name, "layer") == "model.layers.3"
    assert unit_of(name, "module") == name
    assert unit_of("lm_head", "layer") == unit_of("lm_head", "module") == "lm_head"
