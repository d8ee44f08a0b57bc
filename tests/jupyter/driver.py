"""A kernel as the tests and the benchmark use it: cells are submitted, and their messages filed under them.

Nothing here looks at the clock except to give up: a wait ends when what it waits for has come, and a `TimeoutError`
tells what has come instead.
"""

import contextlib
import os
import re
import time

import psutil
import zmq
from jupyter_client import BlockingKernelClient, KernelManager
from jupyter_client.kernelspec import KernelSpecManager

#: How long a wait may last that should be over in a second or two: generous, for machines that are busy.
PATIENCE = float(os.environ.get("PATIENCE", "90"))


def plain(text):
    """Without the escape sequences that colour it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class KernelDied(Exception):
    """A kernel ended before it was ready."""


class Cell:
    """An execute request and every message that answers it."""

    def __init__(self, client, msg_id, code):
        self.client, self.msg_id, self.code = client, msg_id, code
        self.reply = None
        #: All messages on iopub, in order, those of status and execute_input included.
        self.messages = []
        self.input_requests = []

    def wait(self, timeout=PATIENCE):
        """Until the reply and the idle message are here."""
        return self.wait_for(lambda cell: cell.done, "its end", timeout)

    def wait_for(self, condition, what="a condition", timeout=PATIENCE):
        """Until `condition(cell)` holds; a cell that has ended will not come to it."""
        ends = lambda: condition(self) or self.done  # noqa: E731
        self.client.pump(ends, timeout, lambda: f"{what} of the cell\n{self.code}\n{self}")
        assert condition(self), f"the cell ended without {what}:\n{self.code}\n{self}"
        return self

    @property
    def idle(self):
        return "idle" in self.states

    @property
    def done(self):
        return self.reply is not None and self.idle

    @property
    def states(self):
        return [m["content"]["execution_state"] for m in self.messages if m["msg_type"] == "status"]

    @property
    def outputs(self):
        return [m for m in self.messages if m["msg_type"] not in ("status", "execute_input")]

    def of_type(self, *types):
        """The contents of the messages of these types."""
        return [m["content"] for m in self.messages if m["msg_type"] in types]

    def stream(self, name):
        return "".join(c["text"] for c in self.of_type("stream") if c["name"] == name)

    @property
    def stdout(self):
        return self.stream("stdout")

    @property
    def stderr(self):
        return self.stream("stderr")

    @property
    def result(self):
        """The plain text of the cell's value; None where it has none."""
        return next((c["data"].get("text/plain") for c in self.of_type("execute_result")), None)

    @property
    def status(self):
        return self.reply and self.reply["content"]["status"]

    @property
    def traceback(self):
        return "\n".join(self.reply["content"].get("traceback", []))

    @property
    def complaint(self):
        """All that the user reads of a failure, without colours."""
        return plain("\n".join([self.reply["content"].get("evalue", ""), self.traceback, self.stderr]))

    def ok(self):
        """The cell, which must not have failed."""
        assert self.status == "ok", f"a cell failed:\n{self.code}\n{self}"
        return self

    def __repr__(self):
        outputs = [f"  {m['msg_type']}: {str(m['content'])[:2000]}" for m in self.messages]
        return "\n".join(["messages:", *outputs, f"reply: {self.reply and self.reply['content']}"])


class Client:
    """One front end of a kernel: its own session and its own sockets."""

    def __init__(self, connection_file):
        self.kc = BlockingKernelClient(connection_file=str(connection_file))
        self.kc.load_connection_file()
        self.kc.start_channels()
        self.cells = {}
        #: Replies on shell and control that belong to no cell, by the id of their request.
        self.replies = {}
        #: Everything on iopub, of other clients too.
        self.heard = []
        self.channels = {
            getattr(self.kc, f"{name}_channel").socket: name for name in ("shell", "control", "iopub", "stdin")
        }
        self.poller = zmq.Poller()
        for socket in self.channels:
            self.poller.register(socket, zmq.POLLIN)

    def close(self):
        self.kc.stop_channels()

    def wait_for_ready(self, timeout=PATIENCE):
        """Until the kernel answers, and what it publishes is heard: a subscription takes a moment."""
        deadline = time.monotonic() + timeout
        while not self.answers(max(0.0, min(1.0, deadline - time.monotonic()))):
            self.check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the kernel is not ready after {timeout:.0f} s")

    def answers(self, seconds):
        request = self.kc.session.msg("kernel_info_request", {})
        self.kc.shell_channel.send(request)
        msg_id = request["header"]["msg_id"]
        try:
            self.pump(lambda: msg_id in self.replies and self.hears(msg_id), seconds, lambda: "an answer")
        except TimeoutError:
            return False
        return True

    def hears(self, msg_id):
        return any(message["parent_header"].get("msg_id") == msg_id for message in self.heard)

    def check_alive(self):
        """A client alone cannot know."""

    def submit(self, code, **options):
        """Sends a cell and does not wait."""
        options.setdefault("allow_stdin", False)
        msg_id = self.kc.execute(code, **options)
        cell = self.cells[msg_id] = Cell(self, msg_id, code)
        return cell

    def run(self, code, timeout=PATIENCE, **options):
        """Sends a cell and waits for its end, good or bad."""
        return self.submit(code, **options).wait(timeout)

    def ask(self, kind, content=None, channel="shell", timeout=PATIENCE):
        """The content of the reply to a request that is no cell."""
        message = self.kc.session.msg(kind, content or {})
        getattr(self.kc, f"{channel}_channel").send(message)
        return self.reply_to(message["header"]["msg_id"], timeout, kind)

    def reply_to(self, msg_id, timeout=PATIENCE, kind="a request"):
        self.pump(lambda: msg_id in self.replies, timeout, lambda: f"the reply to {kind}")
        return self.replies[msg_id]["content"]

    def pump(self, condition, timeout, describe):
        """Files messages until the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"waited {timeout:.0f} s for {describe()}")
            for socket, _ in self.poller.poll(min(left, 1.0) * 1000):
                self.receive(socket)

    def receive(self, socket):
        _, message = self.kc.session.recv(socket)
        if message is None:
            return
        channel = self.channels[socket]
        parent = message["parent_header"].get("msg_id")
        cell = self.cells.get(parent)
        if channel == "iopub":
            self.heard.append(message)
            if cell:
                cell.messages.append(message)
        elif channel == "stdin":
            if cell:
                cell.input_requests.append(message)
        elif cell:
            assert cell.reply is None, f"two replies to one cell: {cell}"
            cell.reply = message
        else:
            self.replies[parent] = message

    def answer(self, cell, text):
        """Types an answer to a cell's request for input."""
        request = cell.input_requests[-1]
        self.kc.stdin_channel.send(self.kc.session.msg("input_reply", {"value": text}, parent=request))


class Kernel(Client):
    """A kernel process with its first client."""

    def __init__(self, name="qlora-nb", cwd=None, env=None, kernel_dirs=None):
        self.manager = KernelManager(kernel_name=name)
        if kernel_dirs:
            self.manager.kernel_spec_manager = KernelSpecManager(kernel_dirs=[str(folder) for folder in kernel_dirs])
        self.manager.start_kernel(cwd=cwd and str(cwd), env=dict(os.environ, **(env or {})))
        super().__init__(self.manager.connection_file)

    @property
    def process(self):
        return psutil.Process(self.manager.provisioner.pid)

    def check_alive(self):
        status = self.manager.provisioner.process.poll()
        if status is not None:
            raise KernelDied(f"the kernel ended with status {status}")

    def processes(self):
        """The kernel's process and all beneath it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return []

    def close(self):
        left = self.processes()
        super().close()
        with contextlib.suppress(Exception):
            self.manager.shutdown_kernel(now=True)
        # Whatever a kernel left behind would slow down the tests that follow; what it should not leave has its test.
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def started(*args, **options):
    """A kernel that is ready, and ends with the block."""
    kernel = Kernel(*args, **options)
    try:
        kernel.wait_for_ready()
        yield kernel
    finally:
        kernel.close()
