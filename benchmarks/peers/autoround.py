"""AutoRound as a peer: quantizes a model's decoder on given tokens, writes the weights it left.

    python -m benchmarks.peers.autoround MODEL TOKENS OUT --bits 3
        [--group-size 64] [--iters 200] [--device cuda]

MODEL is a folder with a checkpoint of a causal language model and its tokenizer. TOKENS is a
safetensors file whose "tokens", integers (N, T), are AutoRound's calibration windows. Weights
only, asymmetric, the linear layers of the decoder's blocks alone; all else as AutoRound has it by
default, but for torch.compile, which is off: it is there for speed. Nothing is fetched.

OUT is a safetensors file of `<layer>.weight`, float32: each weight is its group's float16 scale
times (code - zero point). Rounded to the model's own type, that is bit for bit the weight which
AutoRound left in the model: this is checked. OUT.json (OUT's name and ".json") says how it was
made, and `decoder_bits_per_weight`, counted from all codes, scales and zero points.

AutoRound 0.16 runs every block of a Gemma 3 text model with the rotary embedding of the first, so
that blocks of full attention are tuned on wrong activations. Its own remedy for a Gemma 4, that
each block gets its own arguments, is switched on here; `--as-shipped` leaves it off.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
BATCH_SIZE = 8
SCALE_BITS = 16


def main() -> None:
    arguments = parse_arguments()
    tokens_NT = load_file(arguments.tokens)["tokens"].long()
    with TemporaryDirectory(prefix="autoround-") as folder:
        # read when transformers and auto_round are imported: hence the imports inside `tune`
        os.environ |= OFFLINE | {"AR_WORK_SPACE": folder, "HF_HOME": folder}
        model, seconds = tune(arguments, tokens_NT)
    weights, stored_bits = {}, 0
    for name, layer in decoder_layers(model).items():
        weight_OI, bits = dequantize(name, layer, arguments.bits, arguments.group_size)
        weights[f"{name}.weight"] = weight_OI
        stored_bits += bits
    count = sum(weight_OI.numel() for weight_OI in weights.values())
    report = describe(arguments, tokens_NT) | {
        "seconds": round(seconds, 2),
        "layers": len(weights),
        "decoder_bits_per_weight": stored_bits / count,
    }
    save_file(weights, arguments.out)
    Path(f"{arguments.out}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=range(2, 8), required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--as-shipped", action="store_true", help="one rotary embedding for all")
    return parser.parse_args()


def tune(arguments: argparse.Namespace, tokens_NT: Tensor) -> tuple[nn.Module, float]:
    """The model with its decoder's weights quantized and dequantized in place, and the seconds."""
    from auto_round import AutoRound, QuantizationScheme
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(arguments.model.resolve(strict=True))
    tuner = AutoRound(
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval(),
        AutoTokenizer.from_pretrained(path),  # asked for its padding alone
        scheme=QuantizationScheme(bits=arguments.bits, group_size=arguments.group_size, sym=False),
        dataset=batches(tokens_NT),
        seqlen=tokens_NT.shape[1],
        nsamples=len(tokens_NT),
        batch_size=BATCH_SIZE,
        iters=arguments.iters,
        device_map=0 if arguments.device == "cuda" else arguments.device,
        enable_torch_compile=False,
    )
    tuner.has_variable_block_shape |= not arguments.as_shipped
    start = perf_counter()
    model, _ = tuner.quantize()
    return model, perf_counter() - start


def batches(tokens_NT: Tensor) -> list[dict[str, Tensor | None]]:
    """Batches as AutoRound's own loader gives them, with no mask: no window is padded."""
    batches_BT = tokens_NT.split(BATCH_SIZE)
    return [{"input_ids": batch_BT, "attention_mask": None} for batch_BT in batches_BT]


def decoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks. Raises unless just these are quantized."""
    modules = dict(model.named_modules())
    layers = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    scales = {name: getattr(module, "scale", None) for name, module in modules.items()}
    quantized = {name for name, scale in scales.items() if scale is not None}
    if not layers or quantized != layers.keys():
        raise RuntimeError(f"not as planned, quantized or left: {quantized ^ layers.keys()}")
    return layers


def dequantize(name: str, layer: Any, bits: int, group_size: int) -> tuple[Tensor, int]:
    """A layer's weights as its codes, scales and zero points give them, and the bits of these."""
    parts = (layer.weight, layer.scale, layer.zp)
    left_OI, scale_OG, zero_OG = (part.detach().cpu() for part in parts)
    left_OGg = left_OI.unflatten(1, (-1, group_size))
    scale_OG1, zero_OG1 = scale_OG[..., None].float(), zero_OG[..., None].float()
    code_OGg = (left_OGg.float() / scale_OG1).round() + zero_OG1
    weight_OGg = scale_OG1 * (code_OGg - zero_OG1)
    sound = (
        layer.bits == bits
        and scale_OG.dtype == torch.float16
        and scale_OG1.shape == zero_OG1.shape == (*left_OGg.shape[:2], 1)
        and fits(code_OGg, bits)
        and fits(zero_OG1, bits)
        and torch.equal(weight_OGg.to(left_OGg.dtype), left_OGg)
    )
    if not sound:
        raise RuntimeError(f"{name}: no grid of {bits} bits in groups of {group_size}")
    stored_bits = (code_OGg.numel() + zero_OG1.numel()) * bits + scale_OG1.numel() * SCALE_BITS
    return weight_OGg.flatten(1), stored_bits


def fits(integers: Tensor, bits: int) -> bool:
    """Whether these are whole numbers of so many bits."""
    return torch.equal(integers, integers.round().clamp(0, 2**bits - 1))


def describe(arguments: argparse.Namespace, tokens_NT: Tensor) -> dict[str, str | int | bool]:
    """What a reader needs to run this again, and where it ran."""
    cuda = arguments.device.startswith("cuda")
    token_bytes = tokens_NT.contiguous().numpy().astype("<i8").tobytes()
    return {
        "auto_round": version("auto-round"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "bits": arguments.bits,
        "group_size": arguments.group_size,
        "sym": False,
        "iters": arguments.iters,
        "as_shipped": arguments.as_shipped,
        "windows": len(tokens_NT),
        "tokens_sha256": hashlib.sha256(token_bytes).hexdigest(),
        "gpu": torch.cuda.get_device_name(arguments.device) if cuda else "none",
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(arguments.device) if cuda else 0,
    }


if __name__ == "__main__":
    main()
