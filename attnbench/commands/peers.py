"""`attnbench peers`."""

import click

from attnbench.commands.options import JSON, print_json, print_table, tell, width
from attnbench.errors import AttnbenchError


@click.group(invoke_without_command=True)
@JSON
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List other libraries' attention, to measure beside attnbench's own, and which command installs it.

    Each is a plugin of the distribution attnbench-peers, imported only where --plugins names it or takes all.

    \b
    attnbench peers                     # what there is, and what is installed
    attnbench peers install zentorch    # the release for this torch, in a folder of its own
    """
    if ctx.invoked_subcommand:
        return
    from attnbench.peers import PEERS

    told = [
        {"peer": p.name, "version": p.version, "what": p.what, "install": p.misfit or p.missing} for p in PEERS.values()
    ]
    if as_json:
        print_json({"peers": told})
        return
    rows = [[str(each["peer"]), each["version"] or "-", str(each["what"]), str(each["install"])] for each in told]
    print_table(("peer", "installed", "what it is", "to install it"), rows, pad_edge=False, within=width())


@command.command()
@click.argument("name")
def install(name: str) -> None:
    """Install NAME's library into a folder of its own, from which that plugin alone imports.

    It shares this Python and this torch, of which another one has a folder of its own. What was there is replaced.
    """
    from attnbench.advice.folders import install_peer
    from attnbench.peers import PEERS

    peer = PEERS.get(name)
    if not peer:
        raise AttnbenchError(f"no peer is called {name!r}; there are {', '.join(PEERS)}")
    install_peer(peer)
    click.echo(f"{name} {peer.version} in {peer.folder}")
    if peer.missing:
        tell(f"its plugin is missing: {peer.missing}")
