"""Gated LoRA as a method of PEFT."""
