"""`ensemble-distill gc`."""

from __future__ import annotations

import json

import click

from ensemble_distill.cli.options import accepted, quiet, version


@click.command(name="gc")
@click.argument("cache")
@click.option("--delete", is_flag=True, help="Remove what is listed; without it nothing is touched.")
@click.option(
    "--older-than",
    type=click.FloatRange(0),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Age from which a temporary file counts as left behind.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@accepted("limit", "batch-size", "workers", "device")
@quiet
@version
def command(cache: str, delete: bool, older_than: float, as_json: bool, quiet: bool) -> None:
    """List what no commit and no manifest of a CACHE needs, and remove it with --delete.

    \b
    Example:
      ensemble-distill gc caches/fmnist --delete
    """
    from ensemble_distill.cache.collect import garbage, remove
    from ensemble_distill.cli import console as ui
    from ensemble_distill.store.leases import Leases, lease_storage
    from ensemble_distill.store.store import open_store

    console = ui.Console(quiet or as_json)
    store = open_store(cache)
    found = garbage(store, Leases(lease_storage(store.storage)), older_than)
    if delete:
        remove(store, found)
    total = sum(item.bytes for item in found)
    if as_json:
        names = [{"name": item.name, "bytes": item.bytes} for item in found]
        click.echo(json.dumps({"deleted": delete, "bytes": total, "files": names}, indent=1))
    for item in found[:50]:
        console.say(f"{item.name}  {ui.size(item.bytes)}")
    if len(found) > 50:
        console.say(f"… and {len(found) - 50} more")
    verb = "removed" if delete else "to be removed with --delete"
    console.say(f"{cache}: {len(found)} files, {ui.size(total)} {verb}" if found else f"{cache}: nothing to remove")
