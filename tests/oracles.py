"""The losses once more, in float64 NumPy and plain loops, from the papers' equations: rows, or one value."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(p: Array, q: Array) -> float:
    return float(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))


def norm(x: Array) -> float:
    return math.sqrt(float((x.ravel() ** 2).sum()))


def direction(x: Array) -> Array:
    return x / norm(x) if norm(x) > 0 else np.zeros_like(x)


def huber(x: float, y: float) -> float:
    d = abs(x - y)
    return 0.5 * d * d if d <= 1 else d - 0.5


def cosine_rows(s: Array, t: Array) -> list[float]:
    return [1 - float(direction(a) @ direction(b)) for a, b in zip(s, t, strict=True)]


def l2_rows(s: Array, t: Array) -> list[float]:
    return [0.5 * norm(a - b) ** 2 for a, b in zip(s, t, strict=True)]


def attention_rows(s: Array, t: Array, p: float, squared: bool) -> list[float]:
    rows = []
    for a, b in zip(s, t, strict=True):
        maps = [direction(sum(np.abs(c) ** p for c in x).ravel()) for x in (a, b)]
        d = maps[0] - maps[1]
        rows.append(float(np.mean(d**2)) if squared else norm(d))
    return rows


def head_attention_rows(s: Array, t: Array, divergence: str) -> list[float]:
    rows = []
    for a, b in zip(s, t, strict=True):
        q, p = sum(a) / len(a), sum(b) / len(b)
        tokens = [kl(p[i], q[i]) if divergence == "kl" else np.mean((p[i] - q[i]) ** 2) for i in range(len(p))]
        rows.append(float(np.mean(tokens)))
    return rows


def rkd_distance(s: Array, t: Array) -> float:
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
    mu = [sum(norm(x[i] - x[j]) for i, j in pairs) / len(pairs) for x in (s, t)]
    return sum(huber(norm(t[i] - t[j]) / mu[1], norm(s[i] - s[j]) / mu[0]) for i, j in pairs) / len(pairs)


def rkd_angle(s: Array, t: Array) -> float:
    b, errors = len(s), []
    for i in range(b):
        for j in range(b):
            for k in range(b):
                if len({i, j, k}) == 3:
                    angle = [float(direction(x[i] - x[j]) @ direction(x[k] - x[j])) for x in (t, s)]
                    errors.append(huber(*angle))
    return sum(errors) / len(errors)


def similarity_preserving(s: Array, t: Array) -> float:
    b, total = len(s), 0.0
    for i in range(b):
        g = [direction(np.array([x[i] @ x[j] for j in range(b)])) for x in (s, t)]
        total += norm(g[0] - g[1]) ** 2
    return total / b**2


def correlation_congruence(s: Array, t: Array, gamma: float, order: int | None) -> float:
    def kernel(x: Array, y: Array) -> float:
        x, y = direction(x), direction(y)
        if order is None:
            return math.exp(-gamma * norm(x - y) ** 2)
        series = sum((2 * gamma) ** p / math.factorial(p) * float(x @ y) ** p for p in range(order + 1))
        return math.exp(-2 * gamma) * series

    b = len(s)
    return sum((kernel(t[i], t[j]) - kernel(s[i], s[j])) ** 2 for i in range(b) for j in range(b)) / b**2


def pkt(s: Array, t: Array) -> float:
    def conditional(x: Array, j: int) -> Array:
        others = [i for i in range(len(x)) if i != j]
        k = np.array([0.5 * (float(direction(x[i]) @ direction(x[j])) + 1) for i in others])
        return k / k.sum()

    return sum(kl(conditional(t, j), conditional(s, j)) for j in range(len(s))) / len(s)


def decoupled_rows(z: Array, p: Array, labels: Array, alpha: float, beta: float, temperature: float) -> list[float]:
    """``p``: the ensemble's log-probabilities, or any logits."""
    rows = []
    for student, teacher, y in zip(z, p, labels, strict=True):
        q, r = softmax(student / temperature), softmax(teacher / temperature)
        target = kl(np.array([r[y], 1 - r[y]]), np.array([q[y], 1 - q[y]]))
        others = kl(np.delete(r, y) / (1 - r[y]), np.delete(q, y) / (1 - q[y]))
        rows.append(temperature**2 * (alpha * target + beta * others))
    return rows


def dist(z: Array, p: Array, beta: float, gamma: float, temperature: float) -> float:
    q = np.array([softmax(x / temperature) for x in z])
    r = np.array([softmax(x / temperature) for x in p])

    def distance(a: Array, b: Array) -> float:
        a, b = a - a.mean(), b - b.mean()
        return 1 - float(a @ b) / (norm(a) * norm(b))

    inter = sum(distance(q[i], r[i]) for i in range(len(q))) / len(q)
    intra = sum(distance(q[:, c], r[:, c]) for c in range(q.shape[1])) / q.shape[1]
    return temperature**2 * (beta * inter + gamma * intra)


def standardised_rows(z: Array, p: Array, temperature: float) -> list[float]:
    def score(x: Array) -> Array:
        return (x - x.mean()) / math.sqrt(float(((x - x.mean()) ** 2).sum()) / len(x))

    return [
        temperature**2 * kl(softmax(score(b) / temperature), softmax(score(a) / temperature))
        for a, b in zip(z, p, strict=True)
    ]


def crd_rows(s: Array, bank: Array, positives: Array, negatives: Array, samples: int, tau: float) -> list[float]:
    def h(teacher: Array, student: Array) -> float:
        e = math.exp(float(teacher @ student) / tau)
        return e / (e + negatives.shape[1] / samples)

    rows = []
    for x, i, others in zip(s, positives, negatives, strict=True):
        rows.append(-math.log(h(bank[i], x)) - sum(math.log(1 - h(bank[n], x)) for n in others))
    return rows


def vid_rows(mean: Array, variance: Array, t: Array) -> list[float]:
    rows = []
    for m, x in zip(mean, t, strict=True):
        total = 0.0
        for c, v in enumerate(variance):
            for error in np.ravel(x[c] - m[c]):
                total += math.log(math.sqrt(v)) + error**2 / (2 * v)
        rows.append(total)
    return rows


def nst_rows(s: Array, t: Array, degree: int, offset: float) -> list[float]:
    def average(xs: list[Array], ys: list[Array]) -> float:
        return sum((float(x @ y) + offset) ** degree for x in xs for y in ys) / (len(xs) * len(ys))

    rows = []
    for a, b in zip(s, t, strict=True):
        fs, ft = ([direction(channel.ravel()) for channel in x] for x in (a, b))
        rows.append(average(ft, ft) + average(fs, fs) - 2 * average(ft, fs))
    return rows


def flow(first: Array, second: Array) -> Array:
    """[M, H, W] and [N, H, W] to [M, N]."""
    m, n, (h, w) = len(first), len(second), first.shape[1:]
    g = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            for y in range(h):
                for x in range(w):
                    g[i, j] += first[i, y, x] * second[j, y, x] / (h * w)
    return g


def factor_rows(s: Array, t: Array) -> list[float]:
    return [float(np.abs(direction(b.ravel()) - direction(a.ravel())).sum()) for a, b in zip(s, t, strict=True)]


def hidden_rows(s: Array, t: Array, mask: Array) -> list[float]:
    """Mean over real tokens of the mean square over the width."""
    return [
        float(np.mean([np.mean((a[i] - b[i]) ** 2) for i in range(len(a)) if m[i]]))
        for a, b, m in zip(s, t, mask, strict=True)
    ]


def scores_rows(s: Array, t: Array, mask: Array, causal: bool) -> list[float]:
    rows = []
    for a, b, m in zip(s, t, mask, strict=True):
        errors = []
        for head in range(len(a)):
            for i in range(len(m)):
                for j in range(len(m)):
                    if m[i] and m[j] and not (causal and j > i):
                        errors.append((a[head, i, j] - b[head, i, j]) ** 2)
        rows.append(float(np.mean(errors)))
    return rows


def relation_rows(s: tuple[Array, Array], t: tuple[Array, Array], heads: int, mask: Array, causal: bool) -> list[float]:
    def relation(a: Array, b: Array, row: int, head: int, i: int) -> Array:
        d = a.shape[2] // heads
        part = slice(head * d, (head + 1) * d)
        keys = [j for j in range(a.shape[1]) if mask[row, j] and not (causal and j > i)]
        return softmax(np.array([float(a[row, i, part] @ b[row, j, part]) / math.sqrt(d) for j in keys]))

    rows = []
    for row in range(len(mask)):
        real = [i for i in range(mask.shape[1]) if mask[row, i]]
        total = sum(kl(relation(*t, row, h, i), relation(*s, row, h, i)) for h in range(heads) for i in real)
        rows.append(total / (heads * len(real)))
    return rows
