"""`logo pool`: commands that inspect, prepare, list and publish pools."""

from __future__ import annotations

from logo.cli.commands import Commands
from logo.cli.pool import calibrate, examples, export, inspect, lock, push

app = Commands(help="Inspect, prepare, list and publish pools of adapters.", no_args_is_help=True)


app.command("inspect")(inspect.inspect)
app.command("calibrate")(calibrate.calibrate)
app.command("examples")(examples.examples)
app.command("lock")(lock.lock)
app.command("export")(export.export)
app.command("push")(push.push)
