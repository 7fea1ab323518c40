"""`logo pool`: commands that inspect, prepare, list and publish pools."""
