"""Hugging Face models, made from tiny configurations, in the module that their users write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_relflat import FAM
from tests.clients.agreement import Case
from tests.clients.hugging_face import (
    BERT,
    GPT2,
    IN_FLOAT32,
    LENGTH,
    SAMPLES,
    WORDS,
    draw,
    fitting,
    next_words,
    texts,
)

transformers: Any = pytest.importorskip("transformers")

# Rotary embeddings turn pairs of entries, so that a head has an even number of them.
ROTARY = BERT | {"hidden_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_sequence_classification(case: Case, kind: str) -> None:
    """sequence classification"""
    config: Any = (ROTARY if kind == "ModernBert" else BERT) | {"num_labels": 3}
    if kind == "DistilBert":
        config = {"vocab_size": WORDS, "dim": 6, "n_layers": 1, "n_heads": 2, "hidden_dim": 7, "num_labels": 3}
        config |= {"max_position_embeddings": 8, "initializer_range": 0.4}
    if kind == "ModernBert":
        config |= {"cls_token_id": 1, "sep_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**config)
    model = getattr(transformers, f"{kind}ForSequenceClassification")
    layer = "classifier.out_proj" if kind == "Roberta" else "classifier"
    data = texts(labels=draw(2 * SAMPLES, below=6) - 3)
    # ModernBert turns its queries and keys in float32.
    tolerance = IN_FLOAT32 if kind == "ModernBert" else 1e-10
    case.agrees(fitting(lambda: model(config), data), f"model.{layer}", tolerance=tolerance)


def test_regression(case: Case) -> None:
    """sequence classification with one label, a regression"""
    config = transformers.BertConfig(**BERT, num_labels=1)
    data = texts(labels=draw(2 * SAMPLES).float() / 4)
    case.agrees(fitting(lambda: transformers.BertForSequenceClassification(config), data), "model.classifier")


def test_multi_label(case: Case) -> None:
    """sequence classification with several labels at once"""
    config = transformers.BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")
    data = texts(labels=draw(2 * SAMPLES, 3, below=5).float() - 3)
    case.agrees(fitting(lambda: transformers.BertForSequenceClassification(config), data), "model.classifier")


def test_token_classification(case: Case) -> None:
    """token classification, padding ignored"""
    config = transformers.BertConfig(**BERT, num_labels=3)
    data = texts(labels=draw(2 * SAMPLES, LENGTH, below=6) - 3)
    data["labels"][data["attention_mask"] == 0] = -100
    case.agrees(fitting(lambda: transformers.BertForTokenClassification(config), data), "model.classifier")


def test_question_answering(case: Case) -> None:
    """question answering: a span's start and end"""
    config = transformers.BertConfig(**BERT)
    data = texts(start_positions=draw(2 * SAMPLES, below=5) - 3, end_positions=draw(2 * SAMPLES, below=5))
    case.agrees(fitting(lambda: transformers.BertForQuestionAnswering(config), data), "model.qa_outputs")


def test_masked_words(case: Case) -> None:
    """masked language model, the decoder tied to the embedding"""
    config = transformers.BertConfig(**BERT)
    data = texts(labels=draw(2 * SAMPLES, LENGTH))
    data["labels"][:, ::2] = -100
    case.agrees(fitting(lambda: transformers.BertForMaskedLM(config), data), "model.cls.predictions.decoder")


@pytest.mark.parametrize("tied", [True, False])
def test_causal_gpt2(case: Case, tied: bool) -> None:
    """causal language model, head tied to the embedding or not"""
    config = transformers.GPT2Config(**GPT2, tie_word_embeddings=tied)
    case.agrees(
        fitting(lambda: transformers.GPT2LMHeadModel(config), next_words()), "model.lm_head", tolerance=IN_FLOAT32
    )


def test_named_loss(case: Case) -> None:
    """token classification, the loss named: `FAM(loss="cross_entropy", target="labels")`"""
    config = transformers.BertConfig(**BERT, num_labels=3)
    data = texts(labels=draw(2 * SAMPLES, LENGTH, below=6) - 3)
    data["labels"][data["attention_mask"] == 0] = -100
    fit = fitting(lambda: transformers.BertForTokenClassification(config), data)
    case.agrees(fit, "model.classifier", claim={"loss": "cross_entropy", "target": "labels"})


def test_named_loss_of_shifted_words(case: Case) -> None:
    """causal language model, the loss named, which it is not: the model shifts its labels by one word"""
    config = transformers.GPT2Config(**GPT2)
    fam = FAM(loss="cross_entropy", target="labels")
    case.refused(fitting(lambda: transformers.GPT2LMHeadModel(config), next_words()), "Leave out `loss`", callback=fam)


def test_named_loss_of_spans(case: Case) -> None:
    """question answering, the loss named, which it is not: there are two targets"""
    data = texts(start_positions=draw(2 * SAMPLES, below=5) - 3, end_positions=draw(2 * SAMPLES, below=5))
    fit = fitting(lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**BERT)), data)
    case.refused(fit, "target", callback=FAM(loss="cross_entropy", target="start_positions"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_causal_llama(case: Case, kind: str, tied: bool) -> None:
    """causal language model, head tied to the embedding or not"""
    config = getattr(transformers, f"{kind}Config")(**ROTARY, num_key_value_heads=1, tie_word_embeddings=tied)
    model = getattr(transformers, f"{kind}ForCausalLM")
    case.agrees(fitting(lambda: model(config), next_words()), "model.lm_head", tolerance=IN_FLOAT32)


def test_a_hidden_layer_of_bert(case: Case) -> None:
    """an attention's queries, named"""
    config = transformers.BertConfig(**BERT, num_labels=3)
    fit = fitting(lambda: transformers.BertForSequenceClassification(config), texts(labels=draw(8, below=6) - 3))
    case.agrees(fit, "model.bert.encoder.layer.0.attention.self.query", named=True)


def test_a_hidden_layer_of_gpt2(case: Case) -> None:
    """queries, keys and values in one `Conv1D`, named"""
    config = transformers.GPT2Config(**GPT2 | {"n_embd": 4})
    fit = fitting(lambda: transformers.GPT2LMHeadModel(config), next_words())
    case.agrees(fit, "model.transformer.h.0.attn.c_attn", named=True, tolerance=IN_FLOAT32)


def test_the_patches_of_vit(case: Case) -> None:
    """the convolution that makes patches into tokens, named"""
    config = transformers.ViTConfig(**IMAGE | {"num_channels": 1, "image_size": 4, "patch_size": 2}, num_labels=3)
    data = images(labels=draw(2 * SAMPLES, below=6) - 3)
    data["pixel_values"] = data["pixel_values"][:, :1, :4, :4].contiguous()
    fit = fitting(lambda: transformers.ViTForImageClassification(config), data)
    case.agrees(fit, "model.vit.embeddings.patch_embeddings.projection", named=True)


@pytest.mark.parametrize("tied", [True, False])
def test_t5(case: Case, tied: bool) -> None:
    """encoder and decoder, head tied to the embedding or not"""
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=6,
        d_kv=3,
        d_ff=7,
        num_layers=1,
        num_heads=2,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    data = texts(labels=draw(2 * SAMPLES, 3))
    data["labels"][1, 2:] = -100
    case.agrees(
        fitting(lambda: transformers.T5ForConditionalGeneration(config), data), "model.lm_head", tolerance=IN_FLOAT32
    )


IMAGE = {
    "hidden_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 7,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.4,
}


def images(**labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(2 * SAMPLES, 3, 8, 8, generator=generator), **labels}


def test_vit(case: Case) -> None:
    """image classification"""
    config = transformers.ViTConfig(**IMAGE, num_labels=3)
    data = images(labels=draw(2 * SAMPLES, below=6) - 3)
    case.agrees(fitting(lambda: transformers.ViTForImageClassification(config), data), "model.classifier")


def test_clip(case: Case) -> None:
    """contrastive pretraining, where the samples of a batch meet in the loss"""
    text = {key: value for key, value in BERT.items() if key != "initializer_range"}
    config = transformers.CLIPConfig(
        text_config=text | {"eos_token_id": 2, "bos_token_id": 1}, vision_config=IMAGE, projection_dim=4
    )

    class Contrastive(transformers.CLIPModel):  # type: ignore[misc]
        def forward(self, **batch: Any) -> Any:
            return super().forward(**batch, return_loss=True)

    data = texts() | images()
    case.agrees(fitting(lambda: Contrastive(config), data), "model.text_projection")
