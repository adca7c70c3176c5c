"""Times batch-1 decoding of a Llama-3-8B-shaped model, compressed to a mixed plan, against bfloat16 in the same run.

    python -m benchmarks.decode_cuda              # both models and the table of single products
    python -m benchmarks.decode_cuda --only products
    python -m benchmarks.decode_cuda --blocks 4   # a shorter model

Weights are random: speed depends on shapes alone. All models are transformers' Llama with a static cache, compiled by
`torch.compile`, one decoding step captured as a CUDA graph; the time is the device's, per replay. All are compared with
bfloat16 under the attention that they have themselves, `grouped`, which is the faster one. The roofline is the bytes a
token must read (weights as stored, without the embedding) at the bandwidth of a large read in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from allocator.storage import Option, layer_bytes
from compressor.nn.attention import NAME
from compressor.nn.linear import CompressedLinear
from compressor.plugin import join_siblings, replace_layers

CONTEXT, PROMPT = 512, 64
SHAPES = {
    "k_proj": (1024, 4096),
    "q_proj": (4096, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def configuration(blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        attn_implementation=NAME,
    )


def plan(blocks: int, head_bits: int) -> dict[str, Option]:
    """A plan of all widths, group sizes 32 to 128 and some rank, near 3.25 bits per weight."""
    options: dict[str, Option] = {}
    for block in range(blocks):
        rank = {"rank": 16, "factor_bits": 4} if block % 4 == 0 else {}
        gate = Option(2, group_size=32 if block % 4 == 1 else 64) if block % 2 else Option(3, group_size=128)
        chosen = {
            "self_attn.q_proj": Option(3, group_size=64),
            "self_attn.k_proj": Option(4 if block else 6, group_size=64),
            "self_attn.v_proj": Option(5 if block else 8, group_size=64),
            "self_attn.o_proj": Option(4 if block % 4 == 0 else 3, group_size=128),
            "mlp.gate_proj": gate,
            "mlp.up_proj": Option(3, group_size=64),
            "mlp.down_proj": Option(4 if block % 8 == 0 else 3, group_size=64, **rank),
        }
        options |= {f"model.layers.{block}.{name}": option for name, option in chosen.items()}
    if head_bits:
        options["lm_head"] = Option(head_bits, group_size=64)
    return options


def plan_with_head(blocks: int) -> dict[str, Option]:
    """Near 3.25 bits per weight with the head counted, at 4 bits; up and down have larger groups for that."""
    return {
        name: replace(option, group_size=128) if name.endswith(("up_proj", "down_proj")) else option
        for name, option in plan(blocks, 4).items()
    }


def rotated(options: dict[str, Option], ends: tuple[str, ...]) -> dict[str, Option]:
    """The same options, of rotated inputs where a layer's name ends so."""
    return {name: replace(option, rotated=name.endswith(ends)) for name, option in options.items()}


def randomize(layer: CompressedLinear) -> None:
    """Random codes, zero points near the middle, scales that give weights of 0.02."""
    for name, parameter in layer.named_parameters():
        if parameter.dtype == torch.int32:
            parameter.data.random_(-(2**31), 2**31)
        else:
            bits = layer.option.bits if name.startswith("weight") else layer.option.factor_bits
            parameter.data.fill_(0.02 / 2**bits * 3)


def original_model(config: LlamaConfig) -> LlamaForCausalLM:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def compressed_model(original: nn.Module, config: LlamaConfig, options: dict[str, Option]) -> Any:
    """The same model with compressed layers; what is not compressed is shared."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    replace_layers(model, options)
    for name, module in original.named_modules():
        if name in options:
            layer = model.get_submodule(name).to_empty(device="cuda")
            randomize(layer)
            layer.prepare()
        elif not list(module.children()):
            model.set_submodule(name, module)
    join_siblings(model)
    return model


def captured_step(model: Any, config: LlamaConfig) -> Callable[[], None]:
    """One decoding step as a CUDA graph: reads the last token, writes the next."""
    cache = StaticCache(config=config, max_cache_len=CONTEXT)
    token = torch.randint(1000, (1, PROMPT), device="cuda")
    token = model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(dim=-1).clone()
    forward = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def step() -> None:
        token.copy_(forward(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Device time of one run, after three to warm up."""
    for _ in range(3):
        run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats / 1e3


def read_bandwidth() -> float:
    """Bytes per second of summing 4 GiB."""
    data = torch.randn(2**30, device="cuda")
    return data.nbytes / seconds(lambda: data.sum(), 10)


def bytes_read(model: nn.Module) -> int:
    """Bytes of all weights but the embedding, as they are stored."""
    embedding = model.get_submodule("model.embed_tokens")
    return sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in embedding.parameters())


def decoding(blocks: int, bandwidth: float) -> Iterator[str]:
    config = configuration(blocks)
    original = original_model(config)
    peer_s = 0.0
    for title, attention, options in (
        ("bfloat16", NAME, {}),
        ("bfloat16, attention sdpa", "sdpa", {}),
        ("mixed plan, head kept", NAME, plan(blocks, 0)),
        ("mixed plan, head 6 bits", NAME, plan(blocks, 6)),
        ("mixed plan, head 4 bits", NAME, plan_with_head(blocks)),
        ("the same, o and down rotated", NAME, rotated(plan_with_head(blocks), ("o_proj", "down_proj"))),
        ("the same, all rotated", NAME, rotated(plan_with_head(blocks), ("",))),
    ):
        model = compressed_model(original, config, options) if options else original
        model.set_attn_implementation(attention)
        begin = perf_counter()
        step_s = seconds(captured_step(model, config), 100)
        peer_s = peer_s or step_s
        needed = bytes_read(model)
        yield (
            f"{title:28s} {bits_per_weight(options, original):6.3f} bpw {1 / step_s:8.1f} tokens/s"
            f" {step_s * 1e3:7.3f} ms {peer_s / step_s:6.2f} × bfloat16 {needed / 2**30:6.2f} GiB"
            f" {needed / step_s / bandwidth:6.1%} of the roofline  (compiled in {perf_counter() - begin:.0f} s)"
        )
        torch._dynamo.reset()


def bits_per_weight(options: dict[str, Option], original: nn.Module) -> float:
    if not options:
        return 16.0
    shapes = {name: original.get_submodule(name).weight.shape for name in options}
    total = sum(layer_bytes(*shapes[name], option, 0) for name, option in options.items())
    return 8 * total / sum(shape.numel() for shape in shapes.values())


def products(bandwidth: float) -> Iterator[str]:
    """Single products, rotating over copies so that none stays in the cache."""
    yield "one product, µs (share of the bandwidth)" + "".join(f"{name:>18s}" for name in SHAPES)
    yield f"{'bfloat16':40s}" + "".join(product(shape, None, bandwidth) for shape in SHAPES.values())
    for option in (
        *(Option(bits) for bits in (2, 3, 4, 5, 6, 8)),
        Option(3, group_size=32),
        Option(3, group_size=128),
        Option(3, rank=16, factor_bits=4),
    ):
        yield f"{option!s:40s}" + "".join(product(shape, option, bandwidth) for shape in SHAPES.values())


def product(shape: tuple[int, int], option: Option | None, bandwidth: float) -> str:
    rows, columns = shape
    size = 2 * rows * columns if option is None else layer_bytes(rows, columns, option, 0)
    layers = [linear(shape, option) for _ in range(-(-(400 << 20) // size))]
    x = torch.randn(1, columns, device="cuda").bfloat16()
    for layer in layers[:2]:
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    each_s = seconds(graph.replay, 5) / len(layers)
    return f"{each_s * 1e6:10.1f} ({size / each_s / bandwidth:4.0%})"


def linear(shape: tuple[int, int], option: Option | None) -> Callable[[Tensor], Tensor]:
    rows, columns = shape
    with torch.device("cuda"):
        if option is None:
            return nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        layer = CompressedLinear(rows, columns, option, bias=False)
    randomize(layer)
    layer.prepare()
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--only", choices=("products", "decoding"))
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: a large read takes {bandwidth / 1e12:.2f} TB/s", flush=True)
    if arguments.only != "decoding":
        for line in products(bandwidth):
            print(line, flush=True)
    if arguments.only != "products":
        for line in decoding(arguments.blocks, bandwidth):
            print(line, flush=True)


if __name__ == "__main__":
    main()
