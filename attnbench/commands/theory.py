"""`attnbench theory`: what formulas say of a block and of a model. Nothing is run."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.table import Table

from attnbench.errors import AttnbenchError
from attnbench.sizes import parse_bytes
from attnbench.theory import footprint
from attnbench.theory.costs import Product, products
from attnbench.theory.footprint import Line, gb
from attnbench.theory.models import Model, Shape, preset
from attnbench.workload import BLOCKS, PHASES, Workload

ITEM = 2  # bytes of an element in bfloat16


@click.command()
@click.option("--preset", "name", help="A published model, such as gpt2-xl-1.5b or llama-3-8b.")
@click.option("--seq", type=click.IntRange(1), default=1024, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=8, show_default=True, help="Without a preset.")
@click.option("--head-dim", type=click.IntRange(1), default=64, show_default=True, help="Without a preset.")
@click.option("--block", type=click.Choice(BLOCKS), help="[default: encoder, or as the preset is built]")
@click.option("--phase", type=click.Choice(PHASES), default="forward", show_default=True)
@click.option("--device-memory", help="Say whether the preset can be trained in it, such as 32GB.")
@click.pass_context
def command(
    ctx: click.Context, name: str | None, seq: int, batch: int, heads: int, head_dim: int, block: str | None,
    phase: str, device_memory: str | None,
) -> None:  # fmt: skip
    """Count a block's matrix products, and the memory of a whole model, by formula. Nothing is run."""
    given = [p for p in ("heads", "head_dim")
             if ctx.get_parameter_source(p) == click.core.ParameterSource.COMMANDLINE]  # fmt: skip
    if name and given:
        raise AttnbenchError(f"--preset says it already; drop --{given[0].replace('_', '-')}")
    shape = preset(name) if name else Shape(heads, heads, head_dim, head_dim, "as asked")
    memory = parse_bytes(device_memory, "device-memory") if device_memory else None
    if memory and not isinstance(shape, Model):
        raise AttnbenchError("--device-memory needs --preset with a whole model, such as gpt2-xl-1.5b")
    _show(name, shape, seq, batch, block, memory, phase)


def _show(
    name: str | None, shape: Shape, seq: int, batch: int, block: str | None, memory: int | None, phase: str
) -> None:
    """Prints the block's products and, for a model, its memory and whether it fits."""
    model = shape if isinstance(shape, Model) else None
    if model:
        stacks = f"{model.layers} + {model.decoder_layers}" if model.decoder_layers else str(model.layers)
        click.echo(
            f"{name}: {model.parameters():,} parameters, {stacks} layers, d_m {model.width}, d_ff {model.d_ff}, "
            f"{model.heads} heads of {model.head_dim}, {model.kv_heads} kv heads ({model.source})"
        )
    elif name:
        dims = f"{shape.head_dim} and {shape.value_dim}"
        click.echo(
            f"{name}: {shape.heads} heads of {dims}, {shape.kv_heads} kv heads ({shape.source}); attention alone"
        )
    _products(shape, seq, batch, "" if name and not model else block or _block(model, phase), model, phase)
    if model:
        _memory("training, mixed precision with Adam", footprint.training(model, batch, seq))
        _memory("inference", footprint.inference(model, batch, seq))
        _workspaces(footprint.workspaces(model, batch, seq))
    if model and memory:
        need = footprint.total(footprint.training(model, batch, seq))
        click.echo(f"\ntraining needs {gb(need)} of {gb(memory)}: it {'fits' if need <= memory else 'does not fit'}")
        if need > memory:
            click.echo("what would make it fit:")
            for remedy in footprint.remedies(model, batch, seq, memory):
                click.echo(f"  {remedy}")


def _block(model: Model | None, phase: str) -> str:
    """Bidirectional models are encoders, encoder-decoders show their decoder, the rest are decoder-only."""
    if model is None or model.types:
        return "decoder-only" if PHASES[phase].past else "encoder"
    return "decoder" if model.decoder_layers else "decoder-only"


def _products(shape: Shape, seq: int, batch: int, block: str, model: Model | None, phase: str) -> None:
    workload = Workload(
        seq=1 if PHASES[phase].past else seq, kv_seq=seq, phase=phase, batch=batch, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim, value_dim=shape.value_dim, dtype="bfloat16",
        scope="block" if block else "attention", block=block,
        norm="pre" if block else "", mask="full" if block == "encoder" else "causal",
    )  # fmt: skip
    found = products(workload, model.d_ff if model else None, bool(model and model.gated))
    what = f"{block or 'attention'}{' block' if block else ''}"
    tokens = f"one new token on {seq}" if workload.decodes else f"{seq} tokens"
    click.echo(f"\none {what}, batch {batch}, {tokens}, bfloat16, {PHASES[phase].products or phase}")
    table = Table("sub-layer", "product", "of size", "products", "FLOPs", "bytes", "FLOPs a byte", box=None)
    for product in found:
        table.add_row(product.layer, product.name, _order(product), str(product.count), *_figures([product]))
    table.add_row("all", "", "", str(sum(p.count for p in found)), *_figures(found))
    if workload.trains:
        table.add_row("with the backward pass", "", "", str(3 * sum(p.count for p in found)), *_figures(3 * found))
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)
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


def _figures(found: list[Product]) -> tuple[str, str, str]:
    flops, moved = sum(p.flops for p in found), ITEM * sum(p.elements for p in found)
    return f"{flops / 1e9:.3g} G", f"{moved / 1e6:.3g} MB", f"{flops / moved:.0f}" if moved else ""


def _memory(title: str, lines: list[Line]) -> None:
    click.echo(f"\n{title}")
    table = Table("", "memory", "together", "formula", box=None)
    together = 0
    for line in lines:
        together += line.bytes
        table.add_row(line.what, gb(line.bytes), gb(together), line.formula)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


def _workspaces(lines: list[Line]) -> None:
    click.echo("\nworkspace of one layer's attention, forward")
    table = Table("", "memory", "formula", box=None)
    for line in lines:
        table.add_row(line.what, gb(line.bytes), line.formula)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)
