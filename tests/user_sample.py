"""What a user of peft-ila writes, for a type checker (`make lint`). It is not run."""

from typing import Any

from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typing_extensions import assert_type

from peft_ila import EpsilonStability, FrozenPrefix, ILAConfig, ILAModel, LayerImportance, learn_gates, rank
from peft_ila.embedded import smollm2
from peft_ila.export.plain import export_adapter
from peft_ila.ranking.table import plot_overlaps
from peft_ila.workflows.budget import select_within
from peft_ila.workflows.plan import plan

base = AutoModelForCausalLM.from_pretrained(smollm2())
config = ILAConfig(r=8, lora_alpha=16, target_modules="all-linear", granularity="layer", gate_mode="open")
lora: LoraConfig = config
model = get_peft_model(base, config)
trainer = Trainer(model=model, args=TrainingArguments("out"), callbacks=[EpsilonStability(epsilon=0.02)])
trainer.train()
importance = learn_gates(trainer, steps=16, method="attribution", min_agreement=None)
assert_type(importance, LayerImportance)
assert_type(rank(trainer, method="untrained"), LayerImportance)
assert_type(learn_gates(trainer, method="descent", budget=0.3, learning_rate=0.1), LayerImportance)

assert_type(importance.select(top_p=0.3), list[str])
assert_type(importance.gates, list[float])
assert_type(importance.probability(top_k=5), dict[str, float])
other = LayerImportance.load("other.json")
assert_type(importance.overlap(other, top_p=0.75), float)
assert_type(LayerImportance.mean([importance, other]), LayerImportance)
assert_type(importance.to_recipe("axolotl", top_p=0.3), dict[str, Any])
assert_type(importance.freeze_unselected(base, top_p=0.75), list[str])
assert_type(importance.freeze_unselected(base, 0.75, outside=True), list[str])
assert_type(importance.freeze_unselected(base, units=importance.select(0.3)), list[str])
importance.freeze_unselected(base, top_q=0.75)  # type: ignore[call-arg]
assert_type(importance.coin_tosses(top_p=0.3), list[str])
assert_type(select_within(base.config, importance, "24GB", batch_size=4, r=16), list[str])
assert_type(plan(base.config, importance, r=16)["30%"].total, int)
plot_overlaps([("A", importance), ("B", other)], "overlap.png")
importance.save("importance.json")
importance.save_card("adapter")
assert_type(importance.plot("importance.png", top_p=0.3), Figure)
assert_type(importance.plot(top_k=3, min_probability=0.9), Figure)
plain: LoraConfig = importance.to_lora_config(top_p=0.3, r=16, lora_alpha=32, model=base)

gated = ILAModel.from_lora(PeftModel.from_pretrained(base, "adapter"))
assert_type(gated, PeftModel)
gated.set_gate_mode("hard")
gated.apply_mask(importance.select(top_k=5))
gated.to_lora("plain")
export_adapter("adapter", "plain")
trainer.add_callback(FrozenPrefix())
