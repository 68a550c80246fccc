"""Every configuration is exact: a sample of families of `benchmarks/breadth.py`, which tries all of transformers."""

import pytest

from benchmarks.breadth import buildable, classes, differences

FAMILIES = """
    LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM
    Phi3ForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM OPTForCausalLM BloomForCausalLM FalconForCausalLM
    OlmoForCausalLM CohereForCausalLM GlmForCausalLM StableLmForCausalLM GraniteForCausalLM SmolLM3ForCausalLM
    MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM GptOssForCausalLM
    DeepseekV2ForCausalLM DeepseekV3ForCausalLM Llama4ForCausalLM GraniteMoeForCausalLM PhimoeForCausalLM
    Glm4MoeForCausalLM Ernie4_5_MoeForCausalLM JambaForCausalLM BambaForCausalLM Zamba2ForCausalLM
    Lfm2ForCausalLM RecurrentGemmaForCausalLM Qwen3NextForCausalLM
    T5ForConditionalGeneration BartForConditionalGeneration WhisperForConditionalGeneration
    LlavaForConditionalGeneration Wav2Vec2ForCTC HubertForCTC BertForSequenceClassification
    ModernBertForSequenceClassification AlbertForMaskedLM SwinForImageClassification ViTForImageClassification
""".split()


@pytest.mark.support("Architectures", "gated and exported exactly: 47 classes here, all in `benchmarks/breadth.py`")
@pytest.mark.parametrize("name", FAMILIES)
def test_exact(name):
    assert differences(name, buildable(name, classes()[name]), shares=(0.3,)) == []
