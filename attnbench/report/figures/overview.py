"""The figure that stands first: speedup, latency, memory and speed against error of one panel."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnbench.report import drawing, labels, units
from attnbench.report.figures import latency, memory, speedup, tradeoff, winners
from attnbench.report.prepare import Panel
from attnbench.report.style import Style

READ = "Every panel is explained with its own figure below."

_PARTS: tuple[tuple[str, str, drawing.Fill, str], ...] = (
    ("Speedup over the baseline", "speedup", speedup.fill, "no speedup: the baseline has no number"),
    ("Latency", "latency_s", latency.fill, ""),
    ("Peak memory", "peak_bytes", memory.fill, "no memory was measured"),
)


@drawing.styled
def overview(panel: Panel, style: Style, machine: str) -> Figure | None:
    """Speedup, latency, memory and speed against error of one panel in one picture."""
    if not len(drawing.drawable(panel.frame, "latency_s")):
        return None
    figure, axes = drawing.grid(4, height=3.7)
    for ax, (title, column, fill, lacking) in zip(axes, _PARTS, strict=False):
        if len(drawing.drawable(panel.frame, column)):
            fill(ax, panel, style, [panel])
        else:
            _empty(ax, lacking)
        ax.set_title(title, pad=winners.PAD if fill is speedup.fill and ax.axison else 6)
    labels.below(axes[1], panel, style)
    traded = tradeoff.traded(panel.frame)
    if len(traded):
        # The longest length among those that the most variants finished.
        counts = traded.groupby("length")["plugin"].nunique()
        length = counts[counts == counts.max()].index.max()
        traded = traded[traded["length"] == length]
        tradeoff.fill(axes[3], traded, style, traded)
        axes[3].set_title(f"Speed against error at {panel.axis} {units.length(length)}")
    else:
        _empty(axes[3], "no error was measured")
        axes[3].set_title("Speed against error")
    extra = [*drawing.explained(panel.frame), memory.FLOOR, tradeoff.FRONT]
    drawing.legend(figure, style, panel.frame["plugin"], extra)
    drawing.suptitle(figure, ", ".join(part for part in (panel.title, panel.shared) if part), machine)
    drawing.lay_out(figure)
    if len(traded):
        tradeoff.label(figure, axes[3], traded, style)
    return figure


def _empty(ax: Axes, text: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", color=drawing.GREY, transform=ax.transAxes)
