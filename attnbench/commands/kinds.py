"""What `--list` shows of things that are installed beside plugins: KV caches, and schemes of several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from msgspec import to_builtins

from attnbench.commands.options import print_json

if TYPE_CHECKING:
    from attnbench.registry import Found
    from attnbench.workers.about_caches import CacheDescribed
    from attnbench.workers.about_parallel import SchemeDescribed
    from attnbench.workers.messages import Failure


def show_kinds(
    word: str,
    offered: Sequence[tuple[Found, CacheDescribed | SchemeDescribed | Failure, dict[str, str]]],
    as_json: bool,
) -> None:
    """Prints each with its options, or why it can't be asked. word: what one is called. With it, more of its facts."""
    from attnbench.workers.messages import Failure

    told = []
    for found, said, more in offered:
        facts: dict[str, Any] = {word: found.name, "from": found.origin} | more | {"what": "", "options": {}}
        told.append(facts)
        if isinstance(said, Failure):
            facts["what"] = f"{said.status}: {said.reason}"
        else:
            facts |= {"what": said.what, "options": to_builtins(said.options)}
    if as_json:
        print_json({f"{word}s": told})
        return
    for facts in told:
        click.echo(f"{facts[word]} ({facts['from']}): {facts['what']}")
        for name, choice in facts["options"].items():
            values = (choice["default"], *choice["choices"])
            default, *among = (str(x).lower() if isinstance(x, bool) else str(x) for x in values)
            of = f" ({', '.join(among)})" if among else ""
            click.echo(f"    {name}={default}{of}: {choice['help']}")
