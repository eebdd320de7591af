"""The second bench: handwritten digits, real pictures that nothing in this package was tuned on.

    python -m benchmarks.digits teacher            # trains the teacher, in out/digits; goes on where it stopped
    python -m benchmarks.digits compare            # every method by the comparison's own recipe; run by run
    python -m benchmarks.digits compare --trainings 1        # a whole table of one training each, to be added to

Results go to `benchmarks/results/digits.json`, `digits.md`, `digits.png`; `digits.md` also holds the order of the
methods against the first bench's.

The pictures are the 1797 of 8 x 8 pixels in scikit-learn (`pip install "arcflow[digits]"`), by 43 people, from the test
set of UCI's optical recognition of handwritten digits. Those in even places are the teacher's; those in odd places
train the checker, and are what its images are compared with.
"""
