"""Adapters of peft on Hugging Face models: the adapted layer counts as a whole, with the weight W + BA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tests.clients.agreement import Case, Fit
from tests.clients.hugging_face import BERT, GPT2, IN_FLOAT32, SAMPLES, draw, fitting, next_words, texts

peft: Any = pytest.importorskip("peft")
transformers: Any = pytest.importorskip("transformers")


def adapted(make: Callable[[], nn.Module], **config: Any) -> Callable[[], Any]:
    def adapt() -> Any:
        return peft.get_peft_model(make(), peft.LoraConfig(r=2, init_lora_weights=False, **config))

    return adapt


def classifier() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))


def classifying(**config: Any) -> Fit:
    make = adapted(classifier, task_type="SEQ_CLS", target_modules=["query", "value"], **config)
    return fitting(make, texts(labels=draw(2 * SAMPLES, below=6) - 3))


def test_head_beside_adapters(case: Case) -> None:
    """`LoraConfig(task_type="SEQ_CLS")` with dropout, whose head is trained whole"""
    case.agrees(classifying(lora_dropout=0.1), "model.base_model.model.classifier.modules_to_save.default")


def test_adapted_layer(case: Case) -> None:
    """`LoraConfig` on an attention's values, named"""
    layer = "model.base_model.model.bert.encoder.layer.0.attention.self.value"
    case.agrees(classifying(), layer, named=True)


def test_rank_stabilised(case: Case) -> None:
    """`LoraConfig(use_rslora=True, lora_alpha=3)` on an attention's queries, named"""
    layer = "model.base_model.model.bert.encoder.layer.0.attention.self.query"
    case.agrees(classifying(use_rslora=True, lora_alpha=3), layer, named=True)


def test_adapted_head(case: Case) -> None:
    """causal language model whose tied head is adapted itself"""
    make = adapted(
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), target_modules=["lm_head", "mlp.c_proj"]
    )
    case.agrees(fitting(make, next_words()), "model.base_model.model.lm_head", tolerance=IN_FLOAT32)
