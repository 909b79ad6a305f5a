"""What `print(adapter.summary())` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attunement.choosing import is_ours

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from attunement.adapter import Adapter


class Summary:
    """What was adapted, how much of it is trained and how large the saved tensors are.

    Attributes:
        trainable: how many numbers are trained; `share`: that over the base's parameters.
        saved_bytes: of the tensors that `save` writes, without the description that stands beside them.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        state = adapter.state()
        self.trainable = adapter.count()
        base = sum(p.numel() for name, p in adapter.model.named_parameters() if not is_ours(name))
        self.share = self.trainable / max(base, 1)
        self.saved_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        adapter = self.adapter
        table = Table(title=f"adapter {adapter.name!r}", title_justify="left")
        for column in ("method", "on", "sites", "trained", "scale"):
            table.add_column(column, justify="right" if column in ("sites", "trained", "scale") else "left")
        for group in adapter.groups_:
            count = sum(p.numel() for owner in group.holders() for p in owner.parameters())
            buffers = [b for h in group.holders() if (b := h._buffers.get("scale")) is not None and not b.is_meta]
            scales = {float(b.flatten()[0]) for b in buffers}
            scale = ", ".join(f"{s:g}" for s in sorted(scales)) if scales else ""
            table.add_row(Text(type(group.method).__name__), Text(group.on), str(len(group.parts)), f"{count:,}", scale)
        yield table
        yield Text(
            f"{self.trainable:,} trainable parameters, {self.share:.2%} of the model; "
            f"{size_of(self.saved_bytes)} of tensors when saved"
        )
        for group in adapter.groups_:
            if group.skipped:
                name, reason = group.skipped[0]
                more = f" and {len(group.skipped) - 1} more" if len(group.skipped) > 1 else ""
                yield Text(f"{type(group.method).__name__} skipped {name}{more}: {reason}", style="dim")

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()


def size_of(count: float) -> str:
    """A number of bytes as a person reads it: `1.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
