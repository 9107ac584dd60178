"""The memory that tests measure is that of the program they run, however much pytest holds itself."""

import memory


def test_the_peak_is_the_programs_own_and_stays_when_memory_is_given_back():
    assert memory.peak() > 300, "torch is loaded here"
    program = "from memory import peak; before = peak(); x = b'1' * 200_000_000; del x; print(before, peak())"
    before, after = map(float, memory.run(program).stdout.split())
    assert before < 100 and 190 < after - before < 250
