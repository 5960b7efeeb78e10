"""BERT of Hugging Face's transformers with Refiner's attention; the one module that imports that library.

The library builds the encoder and looks its attention up by name. Under the name that is registered here, a layer with
a refiner computes its maps, refines them and applies them to its values; other layers use the fused attention. Names
of weights are those of `BertForSequenceClassification`; a refined layer has `attention.self.refiner` besides.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import UserError
from pipeline.models.attention import split_heads
from pipeline.models.bert_options import BertOptions
from pipeline.models.facts import ModelFacts, count_params
from pipeline.models.refine_maps import LinearRefiner

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    from transformers import AttentionInterface, AttentionMaskInterface, BertConfig, BertForSequenceClassification
    from transformers.utils import logging as hf_logging
except ImportError as error:
    raise UserError("task=language needs transformers; install it with: pip install 'rookery[nlp]'") from error

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
NAME = "rookery_refiner"


def refined_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The library's attention interface.

    Args:
        module: the layer's attention; its `refiner` is used where it has one.
        query, key, value: (B, H, N, C / H).
        attention_mask: (B, 1, 1, N) bool, True for tokens; None: there is no padding.
        scaling: of the products; None: 1 / √(C / H).
        dropout: of the maps, before they are refined.

    Returns:
        (B, N, H', C / H') and the refined maps (B, H', N, N), None for a layer without a refiner. Maps are 0 wherever
        query or key is padding.
    """
    refiner = getattr(module, "refiner", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if refiner is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scale
        )
        return out.transpose(1, 2), None
    # Half of the scale on either side: in half precision the product of unscaled ones may overflow.
    scores = (query * scale**0.5) @ (key * scale**0.5).transpose(-2, -1)
    real = None
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        real = (attention_mask & attention_mask.transpose(-2, -1)).to(scores.dtype)
    maps = refiner(F.dropout(torch.softmax(scores, dim=-1), dropout), real)
    if maps.shape[1] != value.shape[1]:
        value = split_heads(value.transpose(1, 2).flatten(2), maps.shape[1])
    return (maps.to(value.dtype) @ value).transpose(1, 2), maps


def token_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The library's mask interface: (B, N) bool -> (B, 1, 1, N), without a look at its values."""
    return None if attention_mask is None else attention_mask[:, None, None, :]


AttentionInterface.register(NAME, refined_attention)
AttentionMaskInterface.register(NAME, token_mask)


class Bert(BertForSequenceClassification):
    """Token numbers -> logits (B, num_classes) of the pooled first token.

    Args:
        options: sizes, dropout, refined layers.
    """

    def __init__(self, options: BertOptions) -> None:
        super().__init__(bert_config(options))
        self.options = options
        for i, layer in enumerate(self.bert.encoder.layer):
            layer.is_encoder_layer = True
            if options.refine is not None and i in options.refined:
                refiner = options.refine.make(options.heads, options.dim // options.heads)
                if isinstance(refiner, LinearRefiner) and options.refine_start == "identity":
                    refiner.start_as_identity()
                layer.attention.self.refiner = refiner

    def forward(self, ids: Tensor, types: Tensor, real: Tensor) -> Tensor:
        """(B, N) int64 token numbers, (B, N) int64 which sentence, (B, N) bool not padding -> (B, num_classes)."""
        return super().forward(input_ids=ids, token_type_ids=types, attention_mask=real).logits

    def in_order(self) -> list[nn.Module | nn.Parameter]:
        """Modules in the order in which a forward pass meets them, for `layer_numbers`."""
        return [self.bert.embeddings, *self.bert.encoder.layer, self.bert.pooler, self.classifier]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each encoder layer for the backward pass and recompute the rest."""
        if enable:
            self.activation_checkpointing_enable()
        else:
            self.activation_checkpointing_disable()


def bert_config(options: BertOptions) -> BertConfig:
    """The library's config of the encoder; its own classes read weights back that have no refiner."""
    return BertConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.dim,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.dim,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.attn_dropout,
        max_position_embeddings=options.positions,
        num_labels=options.num_classes,
        attn_implementation=NAME,
    )


def count_macs(model: Bert, length: int) -> int:
    """Multiply-adds of the forward pass of one sample of that length; the model is on the meta device."""
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    was_training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    model.train(was_training)
    return counter.get_total_flops() // 2


def bert_facts(name: str, length: int, **overrides: Any) -> ModelFacts:
    """Facts of an encoder with its head, for samples of that length, without allocating its weights."""
    with torch.device("meta"):
        model = Bert(BertOptions.of(name, overrides))
    return ModelFacts(count_params(model), count_macs(model, length))


_SHAPES = {
    "hidden_size": "dim",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "positions",
}


def check_pretrained(source: str, options: BertOptions) -> None:
    """Make sure from its description alone that pretrained weights fit.

    Args:
        source: a folder with `config.json`, or a name on the hub.

    Raises:
        UserError: there are none, or they are of another size.
    """
    try:
        if Path(source).is_dir() and not Path(source, "config.json").is_file():
            raise OSError("the folder has no config.json")  # the library would take its defaults
        config = BertConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model.init={source}: no BERT there: {_first_line(error)}") from error
    for theirs, ours in _SHAPES.items():
        if getattr(config, theirs) != getattr(options, ours):
            raise UserError(
                f"model.init={source} has {theirs}={getattr(config, theirs)}, the model {ours}={getattr(options, ours)}"
                f"; choose another model.name, or set model.options.{ours}={getattr(config, theirs)}"
            )


def load_pretrained(model: Bert, source: str, new_head: bool) -> None:
    """Take over the weights of a pretrained BERT, or of a finished run.

    Refiners that they don't have stay as they are; everything else must be there, the head where it is not new.

    Raises:
        UserError: weights are missing or of other shapes.
    """
    own = model.state_dict()
    found = _weights(source, model.config)
    if new_head:
        found = {name: tensor for name, tensor in found.items() if not _in_head(name)}
    wanted = [name for name in own if ".refiner." not in name and not (new_head and _in_head(name))]
    wrong = [name for name in wanted if name not in found or found[name].shape != own[name].shape]
    wrong += [name for name in found if name not in own or found[name].shape != own[name].shape]
    if wrong:
        advice = "; set model.init_head=new to start with a new head" if all(map(_in_head, wrong)) else ""
        raise UserError(f"model.init={source}: {wrong[0]} is not in both, or of another shape{advice}")
    model.load_state_dict({**own, **found})


def _weights(source: str, config: BertConfig) -> dict[str, Tensor]:
    """Tensors by the names of `BertForSequenceClassification`, only those that are really there."""
    try:
        if Path(source, "model.safetensors").exists() and "task" in json.loads(Path(source, "config.json").read_text()):
            return load_file(Path(source, "model.safetensors"))
        with torch.random.fork_rng(devices=[]):  # what is missing is drawn, and thrown away here
            model, told = BertForSequenceClassification.from_pretrained(
                source, num_labels=config.num_labels, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.init={source}: can't be read: {_first_line(error)}") from error
    drawn = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}


def _in_head(name: str) -> bool:
    return name.startswith("classifier.")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
