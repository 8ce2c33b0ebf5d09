"""`attnbench theory`: what formulas say of a block and of a model. Nothing is run."""

from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import click

from attnbench.commands import theory_against, theory_devices
from attnbench.commands.options import COUNT, JSON, PATH, option, print_json, print_table, typed
from attnbench.errors import AttnbenchError
from attnbench.sizes import parse_bytes
from attnbench.theory import footprint
from attnbench.theory.costs import Product, products
from attnbench.theory.footprint import gb
from attnbench.theory.models import Model, Shape, preset
from attnbench.workload import BLOCKS, PHASES, Workload, flag

ITEM = 2  # bytes of an element in bfloat16


@click.command()
@option("--preset", "name", help="A published model, such as gpt2-xl-1.5b or llama-3-8b.")
@option("--seq", type=COUNT, default=1024)
@option("--batch", type=COUNT, default=1)
@option("--heads", type=COUNT, default=8, help="Without a preset.")
@option("--head-dim", type=COUNT, default=64, help="Without a preset.")
@option("--block", type=click.Choice(BLOCKS), help="[default: encoder, or as the preset is built]")
@option("--phase", type=click.Choice(PHASES), default="forward")
@option("--device-memory", help="Say whether the preset can be trained in it, such as 32GB.")
@option("--devices", help="Share one attention out among so many: 8..1024 doubles, 2,4,6 lists.")
@option("--peak", help="Of one of the devices, such as 989TFLOP/s.  [default: this machine's, by attnbench calibrate]")
@option("--bandwidth", help="Of its memory, such as 3.35TB/s.  [default: likewise]")
@option("--link", help="What it sends while it receives as much, such as 450GB/s.")
@option("--schemes", default=",".join(theory_devices.USUAL), help=f"Of {', '.join(theory_devices.SCHEMES)}.")
@click.option("--against", type=PATH, help="What attnbench parallel measured: its folder, beside what formulas say.")
@JSON
@click.pass_context
def command(
    ctx: click.Context, /, name: str | None, seq: int, batch: int, heads: int, head_dim: int, block: str | None,
    phase: str, device_memory: str | None, devices: str | None, schemes: str, against: Path | None, as_json: bool,
    **rates: str | None,
) -> None:  # fmt: skip
    """Count a block's matrix products, and the memory of a whole model, by formula. Nothing is run.

    With --devices: what one attention takes of so many, by ring, Ulysses, tensor parallel and an all-gather, and
    below which length each waits for its link.

    \b
    attnbench theory --preset llama-3-8b --seq 8192
    attnbench theory --seq 4096 --heads 16 --head-dim 64
    attnbench theory --seq 65536 --devices 8..64 --peak 989TFLOP/s --bandwidth 3.35TB/s --link 450GB/s
    attnbench theory --against results/RUN                   # formulas beside what attnbench parallel measured
    """
    if against:
        if typed(ctx) - {"against", "as_json"}:
            raise AttnbenchError("--against takes all from its folder; drop the other options")
        theory_against.show(against, as_json)
        return
    if name and (given := typed(ctx) & {"heads", "head_dim"}):
        raise AttnbenchError(f"--preset says it already; drop {flag(sorted(given)[0])}")
    shape = preset(name) if name else Shape(heads, heads, head_dim, head_dim, "as asked")
    memory = parse_bytes(device_memory, "device-memory") if device_memory else None
    model = shape if isinstance(shape, Model) else None
    if memory and not model:
        raise AttnbenchError("--device-memory needs --preset with a whole model, such as gpt2-xl-1.5b")
    if devices:
        if memory or PHASES[phase].past:
            raise AttnbenchError("--devices is of attention, forward or in training; drop --device-memory and decode")
        encodes = block == "encoder" or (not block and model is not None and bool(model.types))
        attention = _workload(shape, seq, batch, "", phase).replace(mask="full" if encodes else "causal")
        theory_devices.show(attention, devices, schemes, rates, as_json)
        return
    if given := typed(ctx) & {*rates, "schemes"}:
        raise AttnbenchError(f"{flag(sorted(given)[0])} needs --devices, such as --devices 8..1024")
    inside = "" if name and not model else block or _block(model, phase)
    if as_json:
        print_json(_figures_of(shape, seq, batch, inside, phase, memory))
        return
    if model:
        stacks = f"{model.layers} + {model.decoder_layers}" if model.decoder_layers else str(model.layers)
        click.echo(
            f"{name}: {model.parameters():,} parameters, {stacks} layers, d_m {model.width}, d_ff {model.d_ff}, "
            f"{model.heads} heads of {model.head_dim}, {model.kv_heads} kv heads ({model.source})"
        )
    elif name:
        heads_of = f"{shape.heads} heads of {shape.head_dim} and {shape.value_dim}"
        click.echo(f"{name}: {heads_of}, {shape.kv_heads} kv heads ({shape.source}); attention alone")
    _products(shape, seq, batch, inside, phase)
    if model:
        _memory(model, batch, seq, memory)


def _block(model: Model | None, phase: str) -> str:
    """Bidirectional models are encoders, encoder-decoders show their decoder, the rest are decoder-only."""
    if model is None or model.types:
        return "decoder-only" if PHASES[phase].past else "encoder"
    return "decoder" if model.decoder_layers else "decoder-only"


def _figures_of(shape: Shape, seq: int, batch: int, block: str, phase: str, memory: int | None) -> dict[str, Any]:
    """All that is printed, as numbers; bytes and operations."""
    model = shape if isinstance(shape, Model) else None
    workload = _workload(shape, seq, batch, block, phase)
    found = products(workload, model.d_ff if model else None, bool(model and model.gated))
    each = [
        {"layer": p.layer, "product": p.name, "count": p.count, "flops": p.flops, "bytes": ITEM * p.elements}
        for p in found
    ]
    told: dict[str, Any] = {"workload": workload.as_dict(), "products": each}
    if model:
        lines = {
            "training": footprint.training(model, batch, seq),
            "inference": footprint.inference(model, batch, seq),
            "workspaces": footprint.workspaces(model, batch, seq),
        }
        told |= {name: [asdict(line) for line in part] for name, part in lines.items()}
        told["parameters"] = model.parameters()
        if memory:
            told["fits"] = footprint.total(lines["training"]) <= memory
    return told


def _workload(shape: Shape, seq: int, batch: int, block: str, phase: str) -> Workload:
    return Workload(
        seq=1 if PHASES[phase].past else seq, kv_seq=seq, phase=phase, batch=batch, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, value_dim=shape.value_dim, dtype="bfloat16",
        scope="block" if block else "attention", block=block,
        norm="pre" if block else "", mask="full" if block == "encoder" else "causal",
    )  # fmt: skip


def _products(shape: Shape, seq: int, batch: int, block: str, phase: str) -> None:
    model, workload = shape if isinstance(shape, Model) else None, _workload(shape, seq, batch, block, phase)
    found = products(workload, model.d_ff if model else None, bool(model and model.gated))
    what = f"{block or 'attention'}{' block' if block else ''}"
    tokens = f"one new token on {seq}" if workload.decodes else f"{seq} tokens"
    click.echo(f"\none {what}, batch {batch}, {tokens}, bfloat16, {PHASES[phase].products or phase}")
    rows = [[p.layer, p.name, _order(p), *_figures([p])] for p in found]
    rows.append(["all", "", "", *_figures(found)])
    if workload.trains:
        rows.append(["with the backward pass", "", "", *_figures(3 * found)])
    print_table(("sub-layer", "product", "of size", "products", "FLOPs", "bytes", "FLOPs a byte"), rows)
    if block == "decoder":
        click.echo(
            "The lecture counts 10 k + 1 products with k heads; it is 10 k + 4: two attentions have an output each, "
            "and the FFN has two matrices."
        )
    elif block:
        click.echo("The lecture counts 3 k + 2 k + 1 + 2 products with k heads; with fewer kv heads there are fewer.")
    click.echo("A causal mask is counted by the pairs that it shows. Bytes: factors and result once, scores included.")


def _order(product: Product) -> str:
    if not product.parameters:
        return "l^2 d"
    return {"ffn": "l d_m d_ff"}.get(product.layer, "l d_m^2" if product.name == "W_O" else "l d_m d_k")


def _figures(found: list[Product]) -> tuple[str, str, str, str]:
    flops, moved = sum(p.flops for p in found), ITEM * sum(p.elements for p in found)
    intensity = f"{flops / moved:.0f}" if moved else ""
    return str(sum(p.count for p in found)), f"{flops / 1e9:.3g} G", f"{moved / 1e6:.3g} MB", intensity


def _memory(model: Model, batch: int, seq: int, device: int | None) -> None:
    """Prints what training and inference hold, and whether training fits the device."""
    training, inference = footprint.training(model, batch, seq), footprint.inference(model, batch, seq)
    for title, lines in (("training, mixed precision with Adam", training), ("inference", inference)):
        click.echo(f"\n{title}")
        together = [gb(count) for count in accumulate(line.bytes for line in lines)]
        rows = [(line.what, gb(line.bytes), sofar, line.formula) for line, sofar in zip(lines, together, strict=True)]
        print_table(("", "memory", "together", "formula"), rows)
    click.echo("\nworkspace of one layer's attention, forward")
    lines = footprint.workspaces(model, batch, seq)
    print_table(("", "memory", "formula"), [(line.what, gb(line.bytes), line.formula) for line in lines])
    need = footprint.total(training)
    if device:
        click.echo(f"\ntraining needs {gb(need)} of {gb(device)}: it {'fits' if need <= device else 'does not fit'}")
    if device and need > device:
        click.echo("what would make it fit:")
        for remedy in footprint.remedies(model, batch, seq, device):
            click.echo(f"  {remedy}")
