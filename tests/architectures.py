"""Real architectures, made small, with random weights that hide nothing: no gain is 1, no memory is as it started.

Each is built by its library's own code. The libraries are imported where they are needed, because they are slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Architecture:
    """How to make a model, a batch that it takes, and how many normalizations of which kinds it has."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    kinds: Mapping[str, int]
    found: bool = True  # whether an input can be found from the model

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """In evaluation, the same at every call."""
        torch.manual_seed(0)
        model = self.build().eval()
        disturb(model)
        return model


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Numbers as after some training, in the parameters of one dimension and in the memories."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(torch.randn_like(buffer), alpha=0.2)
        elif name.endswith("running_var"):
            buffer.mul_(torch.rand_like(buffer) + 0.5)


def images(side: int = 64, rows: int = 2, channels: int = 3) -> Callable[[], Batch]:
    """Random images under Hugging Face's name."""
    return lambda: {"pixel_values": torch.randn(rows, channels, side, side)}


def words(vocabulary: int = 50, length: int = 7, *, decoder: bool = False) -> Callable[[], Batch]:
    """Random tokens under Hugging Face's names."""

    def make() -> Batch:
        ids = torch.randint(1, vocabulary, (2, length))
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4]} if decoder else {"input_ids": ids}

    return make


def resnet() -> nn.Module:
    from transformers.models.resnet import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[2, 2, 1, 1])
    return ResNetModel(config)


def convnext() -> nn.Module:
    from transformers.models.convnext import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32], layer_scale_init_value=0.5))


def regnet() -> nn.Module:
    from transformers.models.regnet import RegNetConfig, RegNetModel

    sizes = {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1], "groups_width": 8}
    return RegNetModel(RegNetConfig(**sizes))


def efficientnet() -> nn.Module:
    from transformers.models.efficientnet import EfficientNetConfig, EfficientNetModel

    return EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=0.25,
            depth_coefficient=0.2,
            image_size=64,
            hidden_dim=320,
            kernel_sizes=[3, 3, 5],
            in_channels=[32, 16, 24],
            out_channels=[16, 24, 40],
            strides=[1, 2, 2],
            num_block_repeats=[1, 2, 1],
            expand_ratios=[1, 4, 4],
            depthwise_padding=[],
        )
    )


def vit() -> nn.Module:
    from transformers.models.vit import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))


def bert() -> nn.Module:
    from transformers.models.bert import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(**sizes, vocab_size=50))


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def llama() -> nn.Module:
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_TEXT))


def gemma() -> nn.Module:
    from transformers.models.gemma import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**_TEXT, head_dim=8))


def t5() -> nn.Module:
    from transformers.models.t5 import T5Config, T5Model

    return T5Model(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50))


def mamba() -> nn.Module:
    from transformers.models.mamba import MambaConfig, MambaModel

    return MambaModel(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=4))


def whisper() -> nn.Module:
    from transformers.models.whisper import WhisperConfig, WhisperModel

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 50}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(**sizes, **tokens, max_source_positions=20))


def wav2vec2() -> nn.Module:
    from transformers.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, **positions))


def segformer() -> nn.Module:
    from transformers.models.segformer import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=16))


def gpt2() -> nn.Module:
    from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32))


def unet() -> nn.Module:
    from diffusers.models.unets.unet_2d import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def noisy() -> Batch:
    """What a denoiser takes."""
    return {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 40])}


ARCHITECTURES = (
    Architecture("ResNet", resnet, images(), {"batch": 23}),
    Architecture("ConvNeXt", convnext, images(), {"layer": 10}),
    Architecture("RegNet", regnet, images(), {"batch": 20}),
    Architecture("EfficientNet", efficientnet, images(), {"batch": 10}),
    Architecture("ViT", vit, images(32), {"layer": 5}),
    Architecture("BERT", bert, words(), {"layer": 5}),
    Architecture("Llama", llama, words(), {"rms": 5}),
    Architecture("Gemma", gemma, words(), {"rms": 5}),
    Architecture("T5", t5, words(decoder=True), {"rms": 12}),
    Architecture("Mamba", mamba, words(), {"rms": 3}),
    Architecture("Whisper", whisper, lambda: {"input_features": torch.randn(2, 80, 40), **_decoded()}, {"layer": 7}),
    Architecture("Wav2Vec2", wav2vec2, lambda: {"input_values": torch.randn(2, 400)}, {"group": 1, "layer": 4}),
    Architecture("SegFormer", segformer, images(), {"layer": 19, "batch": 1}),
    Architecture("GPT-2", gpt2, words(), {"layer": 5}),
    Architecture("U-Net", unet, noisy, {"group": 21}, found=False),
)


def _decoded() -> Batch:
    return {"decoder_input_ids": torch.randint(3, 50, (2, 5))}
