"""The networks of the coverage benchmark: name -> (module with random weights, example inputs)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TIMM = (
    *("resnet18d", "resnest14d", "res2net50_14w_8s", "resnext26ts", "skresnet18", "seresnet33ts", "densenetblur121d"),
    *("dpn48b", "ese_vovnet19b_dw", "efficientnet_lite0", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    *("ghostnet_050", "tinynet_e", "lcnet_050", "fbnetc_100", "mixnet_s", "rexnet_100", "regnetx_002", "repvgg_a0"),
    *("mobileone_s0", "nf_resnet26", "convnext_atto", "convnextv2_atto", "edgenext_xx_small", "poolformer_s12"),
    *("mixer_s32_224", "gmlp_ti16_224", "resmlp_12_224", "vit_tiny_patch16_224", "xcit_nano_12_p16_224", "pvt_v2_b0"),
    *("levit_128s", "efficientformer_l1", "efficientvit_b0", "fastvit_t8", "mobilevit_xxs", "mobilevitv2_050"),
    *("eva02_tiny_patch14_224", "hgnetv2_b0", "cspresnet50", "inception_next_atto", "selecsls42b", "dla34"),
    *("hrnet_w18_small", "starnet_s1", "tiny_vit_5m_224", "beit_base_patch16_224"),
)
SEGMENTATION = ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
DETECTION = ("resnet18_fpn", "mobilenet_v3_large_fpn")
VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b", "swin3d_t")
TRANSFORMERS = ("bert", "opt", "vit", "llama", "whisper-encoder", "gpt2")
QUICK = (
    *("torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1"),
    *("transformers:bert", "transformers:opt"),
)


def model_names() -> list[str]:
    """Every row of the full table, large networks last."""
    import torchvision

    classifiers = torchvision.models.list_models(module=torchvision.models)
    late = ("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_32gf", "regnet_x_32gf", "convnext_large")
    first = [f"torchvision:{name}" for name in classifiers if name not in late]
    return [
        *(f"transformers:{name}" for name in TRANSFORMERS),
        *first,
        *(f"timm:{name}" for name in TIMM),
        *(f"segmentation:{name}" for name in SEGMENTATION),
        *(f"detection:{name}" for name in DETECTION),
        *(f"video:{name}" for name in VIDEO),
        *(f"torchvision:{name}" for name in reversed(late) if name in classifiers),
    ]


def build_model(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network in evaluation mode, its weights drawn from seed 0, and a batch of two inputs."""
    torch.manual_seed(0)
    source, _, model = name.partition(":")
    module, inputs = _BUILDERS[source](model)
    return module.eval(), inputs


def scramble(module: nn.Module) -> None:
    """Replace constant initial values (layer scales of 1e-6, zero heads, unit statistics) by random ones, in place."""
    generator = torch.Generator().manual_seed(1)
    for tensor in module.state_dict(keep_vars=True).values():
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        flat = tensor.detach().reshape(-1)
        if bool((flat == flat[0]).all()) or float(flat.std()) < 1e-4:
            if sum(size > 1 for size in tensor.shape) > 1:
                value = torch.randn(tensor.shape, generator=generator) * (tensor.shape[0] / tensor.numel()) ** 0.5
            else:
                value = torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5
            tensor.data.copy_(value)


def _image(size: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, size, size),)


def _torchvision(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import torchvision

    options: dict[str, Any] = {"weights": None}
    size = 64
    if name.startswith("vit"):
        size = 56 if name == "vit_h_14" else 64
        options["image_size"] = size
    elif name == "maxvit_t":
        size = 224
    elif name.startswith("inception"):
        size = 75
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False
    return torchvision.models.get_model(name, **options), _image(size)


def _timm(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import timm

    module = timm.create_model(name, pretrained=False)
    fixed = any(part in name for part in ("224", "xcit", "pvt", "levit", "efficientformer", "mlp", "inception_next"))
    return module, _image(224 if fixed else 96)


def _segmentation(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import torchvision

    return torchvision.models.get_model(name, weights=None, weights_backbone=None), _image(64)


def _detection(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    from torchvision.models.detection import backbone_utils

    if name == "resnet18_fpn":
        backbone = backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    else:
        backbone = backbone_utils.mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6
        )
    return backbone, _image(64)


def _video(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import torchvision

    module = torchvision.models.get_model(name, weights=None)
    shape = (2, 3, 16, 224, 224) if name in ("mvit_v1_b", "s3d") else (2, 3, 8, 64, 64)
    return module, (torch.randn(shape),)


class Unwrapped(nn.Module):
    """A transformers model called with one tensor, returning its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model(x, return_dict=False)[0]
        return result


def _transformers(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import transformers as hf

    tokens = (torch.randint(1, 90, (2, 12)),)
    model: nn.Module
    if name == "bert":
        model = hf.BertForSequenceClassification(
            hf.BertConfig(
                vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
            )
        )
    elif name == "opt":
        model = hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
                max_position_embeddings=32, word_embed_proj_dim=48, use_cache=False,
            )
        )  # fmt: skip
    elif name == "vit":
        config = hf.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
        )
        return Unwrapped(hf.ViTForImageClassification(config)), _image(32)
    elif name == "llama":
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=100, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=96, max_position_embeddings=32, use_cache=False,
            )
        )  # fmt: skip
    elif name == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=100, n_embd=48, n_layer=2, n_head=4, n_positions=32, use_cache=False)
        )
    else:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        config = hf.WhisperConfig(
            d_model=48, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=96, num_mel_bins=20,
            max_source_positions=16, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return Unwrapped(WhisperEncoder(config)), (torch.randn(2, 20, 32),)
    return Unwrapped(model), tokens


_BUILDERS = {
    "torchvision": _torchvision,
    "timm": _timm,
    "segmentation": _segmentation,
    "detection": _detection,
    "video": _video,
    "transformers": _transformers,
}
