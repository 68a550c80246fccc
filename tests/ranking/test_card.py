import json

import pytest
from conftest import tiny_llama
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel, get_peft_model

from peft_ila import ILAConfig, LayerImportance


@pytest.fixture
def model():
    model = get_peft_model(tiny_llama(), ILAConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for gate, score in zip(model.gates().values(), (0.5, 2.0, -1.0)):
        gate.weight.data.fill_(score)
    return model


def check(directory):
    card = ModelCard.load(directory / "README.md")
    assert {"peft-ila", "arxiv:2410.17875"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    rows = [line for line in card.text.splitlines() if "`model.layers." in line]
    assert rows == [
        "| 1 | `model.layers.1` | 0.881 |",
        "| 2 | `model.layers.0` | 0.622 |",
        "| 3 | `model.layers.2` | 0.269 |",
    ]
    assert card.text.count("## Layer importance") == 1
    assert "![Importance of the layers](importance.png)" in card.text
    assert (directory / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert LayerImportance.load(directory / "importance.json").scores == [0.5, 2.0, -1.0]


@pytest.mark.support("Operations", "model card with ranking and heatmap")
def test_card(model, tmp_path):
    model.save_pretrained(tmp_path)
    plain = (tmp_path / "README.md").read_text()
    model.layer_importance().save_card(tmp_path)
    check(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert all(line in text for line in plain.splitlines())  # what PEFT wrote stays
    PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_card_is_replaced_and_its_other_sections_stay(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = LayerImportance(["x.0"], [1.0])
    other.save_card(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text() + "\n## Licence\n\nMine.\n")
    model.layer_importance().save_card(tmp_path)
    check(tmp_path)
    assert readme.read_text().endswith("\n## Licence\n\nMine.\n") and "x.0" not in readme.read_text()


@pytest.mark.parametrize("tags", ["tags: mine", "tags: [mine, 5]", "license: mit"])
def test_front_matter_of_others(model, tmp_path, tags):
    (tmp_path / "README.md").write_text(f"---\n{tags}\n---\n## Layer importance\n\nold\n\n## Mine\n\nText.\n")
    model.layer_importance().save_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"peft-ila", "arxiv:2410.17875", *(["mine"] if "mine" in tags else [])} == set(card.data.tags)
    assert card.text.count("## Layer importance") == 1 and "old" not in card.text
    assert card.text.endswith("\n## Mine\n\nText.\n")


@pytest.mark.parametrize("broken", ["tags: [", "tags: 5", "- a"])
def test_front_matter_that_is_broken(model, tmp_path, broken):
    (tmp_path / "README.md").write_text(f"---\n{broken}\n---\nText.\n")
    with pytest.raises(ValueError, match=r"README.md is not a valid model card; fix or delete it"):
        model.layer_importance().save_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == f"---\n{broken}\n---\nText.\n"


def test_names_in_a_card_are_only_names(tmp_path):
    LayerImportance(["<script>alert(1)</script>", "a`|b", "x.0"], [3.0, 2.0, 1.0]).save_card(tmp_path)
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| 1 | <code>&#60;script&#62;alert&#40;1&#41;&#60;&#47;script&#62;</code> | 0.953 |",
        "| 2 | <code>a&#96;&#124;b</code> | 0.881 |",
        "| 3 | `x.0` | 0.731 |",
    ]


@pytest.mark.support("Operations", "push_to_hub (payload on disk)")
def test_what_is_pushed(model, tmp_path, monkeypatch):
    calls = []

    def create_repo(self, repo_id, **kwargs):
        calls.append((self.token, repo_id, kwargs))
        return type("RepoUrl", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, repo_id, folder_path, **kwargs):
        calls.append((repo_id, kwargs))
        folder_path = type(tmp_path)(folder_path)
        check(folder_path)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder_path.iterdir()}
        assert json.loads((folder_path / "adapter_config.json").read_text())["peft_type"] == "ILA"
        return "url"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    result = model.layer_importance().push_model_to_hub(
        model, "mine", token="t", private=True, commit_message="ranked"
    )
    assert result == "url"
    assert calls == [
        ("t", "mine", {"private": True, "exist_ok": True}),
        ("me/mine", {"commit_message": "ranked"}),
    ]
