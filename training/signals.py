"""The signals that ask a training process to save and stop, and output that may go away."""

import contextlib
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Takes the stop signals of this process until `release`; `asked` is the name of the last one that came, or None.

    A second Ctrl-C does not wait and raises KeyboardInterrupt, unless `patient`: torchrun sends two for one. `words`
    are said on stderr at each, none if empty. A hang-up or Ctrl-C that the process ignores, as under nohup or in the
    background of a script, stays ignored.
    """

    def __init__(self, words="will save and stop after this step", patient=False):
        self.words, self.patient = words, patient
        self.asked, self.interrupted, self.at_once, self.earlier = None, False, False, {}
        for number in STOP_SIGNALS:
            if number not in OF_A_TERMINAL or signal.getsignal(number) != signal.SIG_IGN:
                self.earlier[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if number == signal.SIGINT and self.interrupted and not self.patient:
            raise KeyboardInterrupt
        self.interrupted |= number == signal.SIGINT
        self.asked = signal.Signals(number).name
        if self.words:
            with contextlib.suppress(OSError):  # nobody may read it any more
                words = "will stop now" if self.at_once else self.words
                os.write(2, f"{self.asked}: {words}\n".encode())  # print may be what was interrupted
        self._leave()

    def _leave(self):
        if self.at_once and self.asked:
            self.at_once = False
            raise StopRequested

    @contextlib.contextmanager
    def leaving(self):
        """Inside, where nothing is lost by it, a stop signal raises StopRequested as soon as it comes."""
        self.at_once = True
        try:
            self._leave()
            yield
        finally:
            self.at_once = False

    def release(self):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


class StopRequested(BaseException):
    """A stop signal came where the run need not wait; no Exception, which PyTorch's compiler would take for its own."""


def say(words):
    """Print a line. Where stdout is gone (a closed pipe or terminal, a full disk), the run goes on without it."""
    try:
        print(words, flush=True)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, until the process ends
        with contextlib.suppress(OSError):
            os.write(2, f"stdout cannot be written ({error.strerror}): going on without it\n".encode())
