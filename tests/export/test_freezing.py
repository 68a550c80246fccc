import re

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from trainers import plain_trainer, sft_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, TrainingArguments

from peft_ila import FrozenPrefix


class Observe(TrainerCallback):
    """Which decoder layers saw a backward pass, and the gradients of the last step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.layers, self.gradients = set(), {}
        for i, layer in enumerate(model.base_model.model.model.layers):
            layer.register_forward_hook(
                lambda module, args, output, i=i: (
                    output.register_hook(lambda _, i=i: self.layers.add(i)) and None if output.requires_grad else None
                )
            )

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def base(tmp_path, nf4):
    if not nf4:
        return tiny_llama(layers=4)
    tiny_llama(layers=4, hidden_size=64).save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantisation, dtype=torch.float32
    )


def observed(tmp_path, tokenizer, dialogues, callbacks, nf4=False, make=sft_trainer, **kwargs):
    options = {"layers_to_transform": [2, 3], "target_modules": ["q_proj", "up_proj"], **kwargs.pop("lora", {})}
    torch.manual_seed(0)
    model = get_peft_model(base(tmp_path, nf4), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    trainer = make(tmp_path, tokenizer, dialogues, model=model, max_steps=2, **kwargs)
    observe = Observe()
    for callback in (*callbacks, observe):
        trainer.add_callback(callback)
    trainer.train()
    return observe, trainer.model


@pytest.mark.support("Trainers", "`FrozenPrefix` under gradient checkpointing, also on NF4")
@pytest.mark.parametrize(
    "nf4, checkpointing, make", [(False, True, plain_trainer), (True, True, sft_trainer), (False, False, sft_trainer)]
)
def test_no_backward_pass_below_the_lowest_selected_layer(tmp_path, tokenizer, dialogues, nf4, checkpointing, make):
    options = {"gradient_checkpointing": checkpointing, "nf4": nf4, "make": make}
    without, _ = observed(tmp_path, tokenizer, dialogues, [], **options)
    spared, model = observed(tmp_path, tokenizer, dialogues, [FrozenPrefix()], **options)
    # layers 0 and 1 are below; the output of 1 is the input of the lowest selected layer
    assert spared.layers == {2, 3}
    if checkpointing:
        assert without.layers == {0, 1, 2, 3}  # if this fails, `FrozenPrefix` is no longer needed
    assert spared.gradients.keys() == without.gradients.keys() and len(spared.gradients) == 8
    for name, gradient in without.gradients.items():
        torch.testing.assert_close(spared.gradients[name], gradient)
    hooks = model.get_input_embeddings()._forward_hooks.values()
    assert not any("FrozenPrefix" in hook.__qualname__ for hook in hooks)  # it leaves the model as it was


def test_trained_embeddings_and_reentrant_checkpointing_are_left_alone(tmp_path, tokenizer, dialogues, caplog):
    spared, _ = observed(tmp_path, tokenizer, dialogues, [FrozenPrefix()], lora={"modules_to_save": ["embed_tokens"]})
    assert any("embed_tokens" in name and gradient.any() for name, gradient in spared.gradients.items())
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    spared, _ = observed(tmp_path, tokenizer, dialogues, [FrozenPrefix()], **reentrant)
    assert len(spared.gradients) == 8 and all(
        gradient.any() for n, gradient in spared.gradients.items() if "lora_B" in n
    )
    assert "With `use_reentrant=False` the backward pass ends at the lowest" in caplog.text


def test_reentrant_checkpointing_that_the_trainer_does_not_know_of(tmp_path, tokenizer, dialogues):
    """`prepare_model_for_kbit_training` leaves the kind to torch, which takes the reentrant one."""

    class Prepare(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={})
            model.get_base_model().enable_input_require_grads()

    lora = {"modules_to_save": ["lm_head"]}
    expected, _ = observed(tmp_path, tokenizer, dialogues, [Prepare()], make=plain_trainer, lora=lora)
    spared, _ = observed(tmp_path, tokenizer, dialogues, [Prepare(), FrozenPrefix()], make=plain_trainer, lora=lora)
    assert spared.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(spared.gradients[name], gradient)
    assert any(gradient.any() for name, gradient in expected.gradients.items() if "lora_B" in name)


def test_no_backward_pass_through_an_image_encoder():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=4, pad_token_id=0)
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, pad_token_id=0)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=r".*language_model\.layers\.1\.self_attn\.q_proj")
    model = get_peft_model(LlavaForConditionalGeneration(config), lora)
    model.enable_input_require_grads()
    reached = set()

    def observe(name, output):
        if output.requires_grad:
            output.register_hook(lambda _: reached.add(name))

    for name, module in model.named_modules():
        if re.search(r"layers\.\d$", name):
            name = ".".join(name.split(".")[-4:])
            module.register_forward_hook(lambda module, args, output, name=name: observe(name, output))
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    inputs = torch.tensor([[1, *[63] * 4, 2]])
    model(input_ids=inputs, pixel_values=torch.rand(1, 3, 8, 8), labels=inputs).loss.backward()
    lowest = "model.language_model.layers.1"
    assert reached == {"vision_tower.encoder.layers.0", "model.language_model.layers.0", lowest}
    reached.clear()
    FrozenPrefix().on_train_begin(arguments, None, None, model=model)
    model(input_ids=inputs, pixel_values=torch.rand(1, 3, 8, 8), labels=inputs).loss.backward()
    assert reached == {lowest}


def test_a_run_that_was_broken_off_leaves_no_hook_behind(tmp_path, tokenizer, dialogues):
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    torch.manual_seed(0)
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", layers_to_transform=[2], target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), lora)
    trainer = sft_trainer(tmp_path, tokenizer, dialogues, model=model, max_steps=2, callbacks=[FrozenPrefix()])
    interrupt = Interrupt()
    trainer.add_callback(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    hooks = model.get_input_embeddings()._forward_hooks.values()
    assert not any("FrozenPrefix" in hook.__qualname__ for hook in hooks)
