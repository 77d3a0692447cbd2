"""The signals that ask a training process to save and stop."""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Takes the stop signals of this process until `release`; `asked` is the name of the last one that came, or None.

    A second Ctrl-C does not wait and raises KeyboardInterrupt, unless `patient`: torchrun sends two for one. `words`
    are said on stderr at each, none if empty.
    """

    def __init__(self, words="will save and stop after this step", patient=False):
        self.words, self.patient, self.asked = words, patient, None
        self.earlier = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}

    def _note(self, number, frame):
        if self.asked and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self.words:
            os.write(2, f"{self.asked}: {self.words}\n".encode())  # print may be what was interrupted

    def release(self):
        for s, handler in self.earlier.items():
            signal.signal(s, handler)
