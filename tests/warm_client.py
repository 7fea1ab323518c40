"""usage: warm_client.py ADDRESS ADDRESS PYTHON-ARGUMENT...

Has one of the parents at the addresses fork a process, which runs what the arguments ask Python for, and behaves as
that process would. Where both say that a fork would not do the same, it becomes an interpreter.
"""

import array
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


pid, early = 0, []


def forward(number, _):
    if pid:
        os.kill(pid, number)
    else:
        early.append(number)


def ask(address, asked):
    """The parent's answers, the first of which is the id of the process, or 0."""
    parent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    parent.connect(address)
    streams = array.array("i", [0, 1, 2])
    parent.sendmsg([len(asked).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    parent.sendall(asked)
    return parent.makefile("rb")


for number in FORWARDED:
    signal.signal(number, forward)
arguments = sys.argv[3:]
asked = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
for address in sys.argv[1:3]:
    answers = ask(address, asked)
    pid = int(answers.readline())
    if pid:
        break
for number in early if pid else ():
    os.kill(pid, number)
code = int(answers.readline()) if pid else 0
for number in FORWARDED:
    signal.signal(number, signal.SIG_DFL)
if not pid:
    os.execv(sys.executable, [sys.executable, *arguments])
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
