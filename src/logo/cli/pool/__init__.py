"""`logo pool`: commands that inspect, compare, shrink, convert and publish pools."""

from __future__ import annotations

from logo.cli import calibrate
from logo.cli.commands import Commands
from logo.cli.pool import card, convert, dedupe, diff, examples, export, health, inspect, learn, lock, prune, push

app = Commands(help="Inspect, compare, shrink, convert and publish pools of adapters.", no_args_is_help=True)


app.command("inspect")(inspect.inspect)
app.command("calibrate")(calibrate.calibrate)
app.command("lock")(lock.lock)
app.command("diff")(diff.diff)
app.command("dedupe")(dedupe.dedupe)
app.command("prune")(prune.prune)
app.command("convert")(convert.convert)
app.command("examples")(examples.examples)
app.command("learn")(learn.learn)
app.command("card")(card.card)
app.command("push")(push.push)
app.command("export")(export.export)
app.command("health")(health.health)
