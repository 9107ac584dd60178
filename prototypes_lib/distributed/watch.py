"""Processes that train together watch each other: a killed or stalled one ends the others soon, and they say which.

A collective waits for a lost peer for many minutes, or fails without a name. So a thread of every process says each
`beat` seconds, through the key-value store that the group has anyway, that the process lives and how far it is, and
reads what the others say. Ages are counted in rounds of this exchange, not on clocks: who was suspended for a while
does not accuse the others.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch.distributed as dist

STATUS = 76  # exit status of a process that another one's end or silence has ended
HURRY = 3  # rounds without a word that suffice once a collective has failed here


class Watch:
    """This process's share in the watch; without a store (a process by itself) nothing is watched.

    Another process is given up, and this one ends with `STATUS` and one line on stderr that names it, when

    * its beats stop for `patience` seconds (killed, suspended, its machine gone), or the store's host is lost;
    * its main thread stands still for `patience` seconds while others wait for it: it has begun fewer collectives
      than they, begun none and called neither `alive` nor been `busy` in that time. Only once it has done a step,
      because the first may compile for minutes;
    * it left with an error and this one waits for it.

    Args:
        store: a client of the group's store for this watch alone, keys included. rank, world: of the group.
        host: who holds the store and is accused when it is lost; rank 0 by default.
        patience, beat: seconds.
    """

    def __init__(
        self,
        store: dist.Store | None = None,
        rank: int = 0,
        world: int = 1,
        host: str | None = None,
        patience: float = 20.0,
        beat: float = 1.0,
    ):
        self.rank, self._store, self._host, self._beat = rank, store, host, beat
        self._limit = max(HURRY, round(patience / beat))
        self._beats, self._moves, self._calls, self._step, self._state = 0, 0, 0, None, "here"
        self._busy, self._silent, self._asked, self._verdict = 0, 0, False, ""
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._keys = [str(r) for r in range(world)]
        self._missed, self._still = [0] * world, [0] * world
        if store is not None:
            self._tell()

    def start(self) -> None:
        """Wait for the first word of all, and begin."""
        if self._store is None:
            return
        self._said = self._heard()
        self._host = self._host or self._said[0]["name"]
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._listen, self._guard)]
        for thread in self._threads:
            thread.start()

    def alive(self, step: int | None = None) -> None:
        """The main thread moves; with `step`, this step is done. Costs nothing: call it each step and in long loops."""
        self._moves += 1
        self._step = self._step if step is None else step

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Inside, standing still is no fault: for one long call while others wait, such as writing a checkpoint."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    def blame(self) -> None:
        """After a collective failed: end this process, naming the rank that is gone; returns if none is."""
        self._asked = True
        if self._threads:
            self._threads[0].join((HURRY + 2) * self._beat)

    def leave(self, error: str = "") -> None:
        """Say goodbye, or that this process fails with an error; who holds the store first lets the others go."""
        if not self._threads:
            return
        self._state = error or "left"
        with contextlib.suppress(RuntimeError):  # a lost store: the others know
            self._tell()
            rounds = 0
            while self._host == self._name() and any(said["state"] == "here" for said in self._heard()):
                rounds += 1
                if error and rounds > 4 * HURRY:
                    break
                self._over.wait(self._beat / HURRY if error else 0.02)
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self._beat)
        self._threads = []

    def _name(self) -> str:
        return f"rank {self.rank} (pid {os.getpid()}, host {socket.gethostname()})"

    def _tell(self) -> None:
        said = {
            "name": self._name(), "beats": self._beats, "moves": self._moves, "calls": self._calls,
            "step": self._step, "state": self._state, "verdict": self._verdict,
        }  # fmt: skip
        self._store.set(str(self.rank), json.dumps(said))

    def _heard(self) -> list[dict]:
        return [json.loads(text) for text in self._store.multi_get(self._keys)]

    def _listen(self) -> None:
        try:
            while not self._over.wait(self._beat):
                self._beats += 1
                self._moves += self._busy > 0
                self._calls = _begun()
                self._tell()
                before, self._said = self._said, self._heard()
                self._silent = 0
                for r, (old, new) in enumerate(zip(before, self._said, strict=True)):
                    same = {key for key in old if old[key] == new[key]}
                    self._missed[r] = self._missed[r] + 1 if "beats" in same else 0
                    self._still[r] = self._still[r] + 1 if {"moves", "calls"} <= same else 0
                if not self._over.is_set():
                    self._judge()
        except RuntimeError:
            if not self._over.is_set() and self._state == "here":
                self._end(f"{self._host} has died", lost=True)

    def _judge(self) -> None:
        said, mine = self._said, self._said[self.rank]
        for s in said:
            if s["verdict"] and s is not mine:
                self._end(s["verdict"])
        here = [r for r, s in enumerate(said) if s["state"] == "here"]
        for r in here:
            if self._missed[r] >= (HURRY if self._asked else self._limit):
                self._end(f"{said[r]['name']} has not been heard of for {self._missed[r] * self._beat:.0f} s")
        furthest = max((said[r]["calls"] for r in here), default=0)
        late = [r for r in here if said[r]["calls"] < furthest and said[r]["step"] is not None]
        late = [said[r] for r in late if self._still[r] >= self._limit]
        if late:
            s, seconds = min(late, key=lambda s: s["calls"]), self._limit * self._beat
            self._end(f"{s['name']} has stalled after step {s['step']}: no progress for {seconds:.0f} s")
        for s in said:
            still = self._still[self.rank] if mine["state"] == "here" else 0
            waits = still >= (1 if mine["calls"] > s["calls"] else self._limit // 2)
            if s["state"] not in ("here", "left") and (self._asked or waits):
                self._end(f"{s['name']} has failed: {s['state']}")
            if s["state"] == "left" and self._asked:
                self._end(f"{s['name']} has left before the others were done")

    def _guard(self) -> None:
        """Reading from a store whose host is suspended never returns, so a second thread looks at the first."""
        while not self._over.wait(self._beat):
            self._silent += 1
            if self._silent > self._limit:
                self._end(f"{self._host} has not been heard of for {self._silent * self._beat:.0f} s", lost=True)

    def _end(self, verdict: str, lost: bool = False) -> None:
        """End this process, whose main thread may be in a collective that never returns; `lost`: the store is."""
        if verdict.startswith(self._name()):  # where it hangs
            stack = sys._current_frames().get(threading.main_thread().ident)
            os.write(2, "".join(traceback.format_stack(stack)).encode())
        os.write(2, f"error: {verdict}; rank {self.rank} ends\n".encode())
        if not lost:
            self._state, self._verdict = "left", verdict
            with contextlib.suppress(RuntimeError):
                self._tell()
                if self._host == self._name():  # the others read the verdict before the store goes
                    time.sleep(2 * self._beat)
        os._exit(STATUS)


def _begun() -> int:
    """Collectives that this process has begun, DDP's and FSDP's too; 0 before there is a group."""
    return dist.group.WORLD._get_sequence_number_for_group() if dist.is_initialized() else 0
