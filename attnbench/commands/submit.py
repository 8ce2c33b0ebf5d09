"""`attnbench submit`."""

import sys
from pathlib import Path

import click

from attnbench.commands.options import CELL_FAILED, JSON, PATH, option, print_json


@click.command()
@click.argument("run", type=PATH)
@option("--out", type=PATH, default=Path("submissions"), help="The folder to write to.")
@option("--machine", help="What to call the machine, such as 'c7a.large, Zen 4'.  [default: what it calls itself]")
@option("--check", "only_check", is_flag=True, help="Write nothing.")
@JSON
def command(run: Path, out: Path, machine: str | None, only_check: bool, as_json: bool) -> None:
    """Check that RUN is fit to be shared, and write it as one file for a pull request.

    Fit is what others can place and repeat: finished, on a machine that has a name and was calibrated for its device
    and threads, by a committed version, with the command, every planned cell in it, failed ones too, and a speedup to
    verify. What is missing is said with how to mend it, nothing is written, and the exit code is 1.

    \b
    attnbench submit results/RUN
    attnbench submit results/RUN --machine 'Ryzen 7 7840U laptop' --out submissions
    """
    from attnbench.advice.submit import examine
    from attnbench.errors import refusals
    from attnbench.records.machines import apart
    from attnbench.records.run import replace_file
    from attnbench.records.submission import content
    from attnbench.report import units
    from attnbench.report.prepare import command_line, machine_name

    found = examine(run, machine)
    data, path = content(found.shared), None
    if not found.missing and not only_check:
        path = out / found.name
        with refusals(f"write {path}", "choose another --out"):
            out.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
    if as_json:
        missing = [{"what": each.what, "mend": each.mend} for each in found.missing]
        print_json({"run": str(run), "file": path and str(path), "missing": missing, "told": found.told})
    else:
        meta = found.shared.meta
        on = "; ".join(map(machine_name, apart(meta).values()))
        click.echo(f"{units.count(found.shared.length, 'row')} on {on}: {command_line(meta)}")
        for line in found.told:
            click.echo(f"  {line}")
        for each in found.missing:
            click.echo(f"missing: {each.what}; {each.mend}")
        if path:
            click.echo(f"submission: {path} ({units.size(len(data))}); docs/sharing.md says where it goes")
        elif not found.missing:
            click.echo(f"fit to be shared ({units.size(len(data))}); nothing was written")
    sys.exit(CELL_FAILED if found.missing else 0)
