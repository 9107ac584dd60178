"""Event files, by which TensorBoard shows a run: metrics.jsonl once more, for those who look there."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FLUSH_S = 10  # an event lies in memory at most so long


def check() -> None:
    """Raises ValueError where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard=True needs TensorBoard: pip install tensorboard, or leave it out; prototypes watch needs none"
        )


class EventFiles:
    """One folder of event files, always equal to the rows: whoever starts anew or goes on writes all of them again.

    So a run that goes on after a stop, also from a checkpoint before its last rows, shows every row once.
    """

    def __init__(self, folder: Path):
        self.folder, self._writer, self._started = folder, None, 0.0

    def start(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Replace what is there by these rows, the newest of which is of now."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink(missing_ok=True)
        self._started = time.time() - (rows[-1].get("seconds", 0.0) if rows else 0.0)
        # purge_step: a TensorBoard that is open forgets what the files before have told it
        self._writer = SummaryWriter(str(self.folder), purge_step=0, flush_secs=FLUSH_S)
        for row in rows:
            self.write(row)
        self._writer.flush()

    def write(self, row: Mapping[str, float]) -> None:
        at = self._started + row.get("seconds", 0.0)
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name.replace(" ", "_"), value, int(row["step"]), walltime=at)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
