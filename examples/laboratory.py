# %% [markdown]
# # The laboratory: two calls in the plane
#
# A flow-matching model carries noise to data along curved paths. Here the data are eight small Gaussians on a circle,
# so that the velocity is known in closed form and everything the package does can be seen at work within a minute:
#
#     python examples/laboratory.py --out out/laboratory

# %%
import argparse
import time
from pathlib import Path

import torch

from arcflow.distillation.walk import arcs, euler
from arcflow.laboratory import plane
from arcflow.laboratory.ideal import fit_mixture, ideal_errors, raw_time
from arcflow.path import SHIFT, step_grid
from arcflow.reports.page import EULER, FAINT, STUDENT, TEACHER, canvas, figure_png

parser = argparse.ArgumentParser(description="The story of arcflow in the plane, told in numbers and one image.")
parser.add_argument("--out", type=Path, default=Path("out/laboratory"))
parser.add_argument("--iterations", type=int, default=500)
parser.add_argument("--batch", type=int, default=256)
options = parser.parse_known_args()[0]
started = time.monotonic()
torch.set_num_threads(1)  # tensors this small gain nothing from more

# %% [markdown]
# ## The teacher
#
# `lab.circle()` is called like every teacher of the package, `teacher(x, sigma, cond)`. Its exact paths, from noise
# (sigma 1) to data (sigma 0), by a fourth-order rule in small steps. Half-way through the steps of a sampler the noise
# level is still 0.76: most of the way lies in the second half.

# %%
teacher = plane.circle()
x = plane.starting_points(1000, torch.Generator().manual_seed(0))
sigmas = step_grid(64)
paths = plane.exact(teacher, x, sigmas, trace=True)
ends = paths[-1]

# %% [markdown]
# ## Few straight steps
#
# One Euler step goes to the middle of all data: the same point for every noise. Two begin to turn too late.

# %%
plain = {calls: plane.mean_distance(euler(teacher, x, {}, step_grid(calls)), ends) for calls in (1, 2, 4, 8, 16)}
for calls, error in plain.items():
    print(f"plain Euler, calls {calls:2d}: mean distance {error:.3f} to where the teacher arrives")

# %% [markdown]
# ## Students
#
# A student lays down a whole curve at each call: K velocities, each growing or fading exponentially along the way, and
# a closed formula for the distance they carry. K = 1 is a straight line. All learn with the same network, objective and
# number of iterations, at a high rate, for these are few.

# %%
MODES, CALLS = (1, 2, 4, 16), (1, 2)
students = {}
for modes in MODES:
    for calls in CALLS:
        students[modes, calls] = plane.train_student(
            teacher, modes=modes, steps=calls, iterations=options.iterations, batch=options.batch, lr=1e-2
        )
learned = {key: plane.mean_distance(plane.arrivals(student, x, key[1]), ends) for key, student in students.items()}
for (modes, calls), error in learned.items():
    print(f"student, modes {modes:2d}, calls {calls}: {error:.3f}")

# %% [markdown]
# ## What the modes could do
#
# Fitted to every single path, without a network to learn it (`arcflow.ideal`): what is left of the velocity, which is
# what training matches, falls with K until the exponentials can no longer be told apart. The network is what keeps the
# students above from getting there.

# %%
for modes in (*MODES, 32):
    best = ideal_errors(paths, sigmas, modes=modes, steps=2)
    left, rank = (" and ".join(f"{value:.2g}" for value in values) for values in (best.velocity, best.directions))
    print(f"ideal, modes {modes:2d}, calls 2: squared velocity error {left}, independent curves {rank}")

# %% [markdown]
# ## One image
#
# The students' arcs end near the teacher's but cut its corners: the mean velocity is learned at once, the bend last.
# The ideal arcs, fitted to the same paths, follow it.

# %%
figure, (field, ways, by_modes, by_calls) = canvas(4, 11.0, 10.4, rows=2)
INK = "#0f172a"

# The teacher: where it pushes at noise level 0.4, and forty of its paths.
line = torch.linspace(-3.6, 3.6, 19, dtype=torch.float64)
grid = torch.cartesian_prod(line, line)[:, None]
push = -teacher(grid, torch.full((len(grid),), 0.4, dtype=torch.float64), {})
field.quiver(*grid[:, 0].T, *push[:, 0].T, color=FAINT, width=0.0035, scale=90, zorder=1)
for path in paths[:, :40, 0].transpose(0, 1):
    field.plot(*path.T, color=TEACHER, lw=0.9, alpha=0.55, zorder=2)
field.scatter(*x[:40, 0].T, color="white", edgecolor=TEACHER, lw=0.9, s=16, zorder=3, label="noise")
field.scatter(*ends[:40, 0].T, color=TEACHER, s=16, zorder=4, label="data")
field.set_title("the teacher's paths", fontsize=12, color=INK, pad=10)

# Chords and arcs: of each third of the plane a path that bends much, more than 95 in a hundred do.
chord = (ends - x) / (ends - x).norm(dim=-1, keepdim=True)
away = paths - x
bend = (away - (away * chord).sum(-1, keepdim=True) * chord).norm(dim=-1).amax(0)[:, 0]
bend = bend * (bend < bend.quantile(0.95))
third = ((torch.atan2(ends[:, 0, 1], ends[:, 0, 0]) / torch.pi + 1) * 1.5).floor().clamp(max=2)
chosen = [int((bend * (third == part)).argmax()) for part in range(3)]
student, start = students[16, 2], x[chosen].float()
calls = arcs(student, start, {}, step_grid(2), trace=True)
pieces = []
for i, (here, there) in enumerate(zip(step_grid(2)[:-1], step_grid(2)[1:], strict=True)):
    arc = student(calls[i], here.expand(len(start)), {}).detach()
    pieces += [calls[i] - arc.displacement(0.0, float(s)) for s in torch.linspace(0, float(here - there), 33)]
best = []
for part in (slice(0, 33), slice(32, 65)):
    s, piece = sigmas[part][0] - sigmas[part], paths[part, chosen]
    u = -piece.diff(dim=0) / s.diff().view(-1, 1, 1, 1)
    arc = fit_mixture(u, s, raw_time(sigmas[part], SHIFT), modes=4)
    best += [piece[0] - arc.displacement(0.0, float(level)) for level in s]
chords, curves, fitted = euler(teacher, x[chosen], {}, step_grid(2), trace=True), torch.stack(pieces), torch.stack(best)
places = teacher.means
ways.scatter(*places.T, color=FAINT, s=260, zorder=1)
NAMES = ("teacher", "plain Euler", "student, 16 modes", "ideal, 4 modes")
for i, names in enumerate((NAMES, (None,) * 4, (None,) * 4)):  # the legend names each kind once
    ways.plot(*paths[:, chosen[i], 0].T, color=TEACHER, lw=5, alpha=0.3, label=names[0], zorder=2)
    ways.plot(*chords[:, i, 0].T, color=EULER, lw=1.6, ls=(0, (5, 3)), label=names[1], zorder=3)
    ways.scatter(*chords[:-1, i, 0].T, color=EULER, s=34, marker="s", zorder=3)
    ways.plot(*curves[:, i, 0].T, color=STUDENT, lw=2.2, label=names[2], zorder=4)
    ways.plot(*fitted[:, i, 0].T, color=STUDENT, lw=1.4, ls=(0, (1, 1.6)), label=names[3], zorder=4)
    ways.scatter(*calls[:-1, i, 0].T, color="white", edgecolor=STUDENT, lw=2, s=46, zorder=5)
    for end, color in ((chords[-1], EULER), (paths[-1, chosen], TEACHER), (calls[-1], STUDENT)):
        ways.scatter(*end[i, 0], color=color, s=34, zorder=6)
ways.set_title("two calls: chords and arcs", fontsize=12, color=INK, pad=10)

for panel in (field, ways):
    panel.set(xlim=(-3.8, 3.8), ylim=(-3.8, 3.8), xticks=[], yticks=[], aspect="equal")
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, frameon=False, fontsize=9,
                 columnspacing=1.0, handlelength=1.7)  # fmt: skip

# Errors.
for count, style, mark in ((1, "--", "o"), (2, "-", "o")):
    errors = [learned[modes, count] for modes in MODES]
    name = f"student, {count} call{'s' if count > 1 else ''}"
    by_modes.plot(MODES, errors, color=STUDENT, ls=style, lw=2, marker=mark, ms=6, label=name)
for count in (2, 4, 8):
    by_modes.axhline(plain[count], color=EULER, lw=1, ls=(0, (5, 3)))
    by_modes.annotate(f"Euler, {count}", (1, plain[count]), (4, 0), xycoords=("axes fraction", "data"), va="center",
                      textcoords="offset points", color=EULER, fontsize=9, annotation_clip=False)  # fmt: skip
by_modes.set_xscale("log", base=2)
by_modes.set(xticks=MODES, xticklabels=MODES, xlabel="modes", ylabel="mean distance to the teacher's end")
by_modes.set_title("the more modes, the closer", fontsize=12, color=INK, pad=10)

by_calls.plot(list(plain), list(plain.values()), color=EULER, lw=2, marker="s", ms=5, label="plain Euler")
for modes, alpha in ((1, 0.35), (4, 0.65), (16, 1.0)):
    errors = [learned[modes, count] for count in CALLS]
    name = f"student, {modes} mode{'s' if modes > 1 else ''}"
    by_calls.plot(CALLS, errors, color=STUDENT, alpha=alpha, lw=2, marker="o", ms=6, label=name)
by_calls.set_xscale("log", base=2)
by_calls.set(xticks=list(plain), xticklabels=list(plain), xlabel="network calls")
by_calls.set_title("the same error with fewer calls", fontsize=12, color=INK, pad=10)

for panel in (by_modes, by_calls):
    panel.set_yscale("log")
    panel.set(ylim=(0.05, 4), yticks=(0.1, 0.3, 1, 3), yticklabels=("0.1", "0.3", "1", "3"))
    panel.minorticks_off()
    panel.grid(axis="y", color=FAINT, lw=0.5, alpha=0.6)
    panel.legend(frameon=False, fontsize=9.5, handlelength=3)
    panel.xaxis.label.set_color("#64748b")
    panel.yaxis.label.set_color("#64748b")

figure.tight_layout(w_pad=3, h_pad=2.5)
options.out.mkdir(parents=True, exist_ok=True)
(options.out / "laboratory.png").write_bytes(figure_png(figure))
print(f"{options.out / 'laboratory.png'}, {time.monotonic() - started:.0f} s")
