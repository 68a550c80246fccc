"""Every option of LoraConfig: the same adapter as LoRA in mode "open", gated in "soft"; or a clear refusal."""

from dataclasses import fields

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import MontecloraConfig

from peft_ila import ILAConfig, ILAModel

EMBEDDINGS = {"target_modules": ["embed_tokens", "lm_head"]}
ACCEPTED = [
    ("target_modules: names", {"target_modules": ["q_proj", "up_proj"]}),
    ("target_modules: regex", {"target_modules": r".*layers\.[12]\.mlp\.(up|down)_proj"}),
    ("target_modules: all-linear", {"target_modules": "all-linear"}),
    ("target_modules: lm_head and embeddings", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    ("exclude_modules", {"exclude_modules": r".*\.1\..*"}),
    ("layers_to_transform", {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]}),
    ("layers_pattern", {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("rank_pattern, alpha_pattern", {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("bias: all", {"bias": "all"}),
    ("bias: lora_only", {"bias": "lora_only"}),
    ("use_rslora", {"use_rslora": True}),
    ("init_lora_weights: True", {"init_lora_weights": True}),
    ("init_lora_weights: gaussian", {"init_lora_weights": "gaussian"}),
    ("init_lora_weights: orthogonal", {"init_lora_weights": "orthogonal"}),
    ("lora_dropout", {"lora_dropout": 0.5}),
    ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
    ("trainable_token_indices, tied embeddings", {"trainable_token_indices": [1, 2], "tie": True}),
    (
        "ensure_weight_tying: modules_to_save",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True, "tie": True},
    ),
    (
        "ensure_weight_tying: trainable_token_indices",
        {"trainable_token_indices": [1, 2], "ensure_weight_tying": True, "tie": True},
    ),
    ("ensure_weight_tying: embeddings that are not tied", {**EMBEDDINGS, "ensure_weight_tying": True}),
    ("tied lm_head and embeddings among the targets", {**EMBEDDINGS, "tie": True}),
]
REFUSED = [
    ("layer_replication", {"layer_replication": [(0, 2)]}),
    ("lora_bias", {"lora_bias": True}),
    ("alora_invocation_tokens", {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}),
    ("use_qalora", {"use_qalora": True}),
    ("megatron_config", {"megatron_config": {"a": 1}}),
    ("kasa_config", {"kasa_config": {"a": 1}}),
    ("use_bdlora", {"use_bdlora": {"a": 1}}),
    ("velora_config", {"velora_config": {"a": 1}}),
    ("monteclora_config", {"monteclora_config": MontecloraConfig()}),
    ("arrow_config", {"arrow_config": {"a": 1}}),
    *(
        (f"init_lora_weights: {init}", {"init_lora_weights": init})
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "mica", "eva", "loftq")
    ),
]
# Not options of the mathematics, options of another option that is refused, or of a test file of their own.
BESIDES = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r lora_alpha
    runtime_config megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size fan_in_fan_out
    use_dora target_parameters
""".split()


def supported(rows):
    return [
        pytest.param(options, marks=pytest.mark.support("Options of `LoraConfig`", f"`{row}`"), id=row)
        for row, options in rows
    ]


def test_no_option_of_peft_is_forgotten():
    known = {name for _, options in ACCEPTED + REFUSED for name in options} | set(BESIDES)
    assert {field.name for field in fields(LoraConfig)} <= known


@pytest.mark.parametrize("options", supported(ACCEPTED))
def test_accepted(options, input_ids, tmp_path):
    options = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    options.setdefault("init_lora_weights", False)
    base = {"tie_word_embeddings": options.pop("tie", False), "attention_bias": True, "mlp_bias": True}
    models = []
    for config in (ILAConfig(**options, gate_mode="open"), LoraConfig(**options)):
        torch.manual_seed(0)
        models.append(get_peft_model(tiny_llama(**base), config))
    ila, lora = models

    # open: LoRA bit for bit, in the same parameters
    trainable = [{n for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert trainable[0] == trainable[1]
    losses = []
    for model in models:
        torch.manual_seed(1)
        loss = model.train()(input_ids, labels=input_ids).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for name in trainable[0]:
        assert torch.equal(ila.get_parameter(name).grad, lora.get_parameter(name).grad)

    # soft: the delta of each layer times its gate
    ila.set_gate_mode("soft")
    gates = ila.gates()
    assert {id(p) for p in ila.parameters() if p.requires_grad} == {id(gate.weight) for gate in gates.values()}
    for gate, value in zip(gates.values(), torch.linspace(-2, 2, len(gates))):
        gate.weight.data.fill_(value)
    for name, module in lora.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            (unit,) = (unit for unit in gates if f"{name}.".startswith(f"{unit}."))
            module.scaling["default"] *= torch.sigmoid(gates[unit].weight).item()
    ila.eval(), lora.eval()
    expected = lora(input_ids).logits
    torch.testing.assert_close(ila(input_ids).logits, expected)

    ila.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(**base), tmp_path)
    assert torch.equal(loaded(input_ids).logits, ila(input_ids).logits)
    merged = [model.merge_and_unload()(input_ids).logits for model in models]  # PEFT warns that tied weights go wrong
    torch.testing.assert_close(*merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=pytest.mark.support("Options of `LoraConfig`", f"`{row}`", refused=True), id=row)
        for row, options in REFUSED
    ],
)
def test_refused(options):
    (name,) = (name for name in options if name != "task_type")
    if options[name] == "loftq":
        pytest.importorskip("scipy")  # PEFT asks for it first
        options = {**options, "loftq_config": {"loftq_bits": 4}}
    with pytest.raises(ValueError, match=f"ILA does not support `{name}"):
        ILAConfig(**options)


@pytest.mark.support("Options of `LoraConfig`", "`ensure_weight_tying: adapters on tied modules`", refused=True)
@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "lm_head"], "embed_tokens|.*q_proj"])
def test_tied_adapters_are_refused(targets):
    options = {"target_modules": targets, "ensure_weight_tying": True}
    with pytest.raises(ValueError, match="does not support `ensure_weight_tying` for embeddings and a head"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), ILAConfig(**options))
    lora = get_peft_model(tiny_llama(tie_word_embeddings=True), LoraConfig(**options))
    with pytest.raises(ValueError, match="does not support `ensure_weight_tying` for embeddings and a head"):
        ILAModel.from_lora(lora)
