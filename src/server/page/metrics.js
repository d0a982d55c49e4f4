// OpenMetrics text, and what follows from two readings of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)/;
const BOUND = /(?:^|,)le="([^"]*)"/;

/** Sums over labels: of each name, and of each histogram's buckets by their upper bound. */
export function parseMetrics(text) {
  const values = new Map(), buckets = new Map();
  for (const line of text.split('\n')) {
    const [, name, labels = '', written] = LINE.exec(line) ?? [];
    const value = Number(written === '+Inf' ? Infinity : written);
    if (!name || Number.isNaN(value)) continue;
    const bound = name.endsWith('_bucket') ? BOUND.exec(labels)?.[1] : undefined;
    if (bound === undefined) {
      values.set(name, (values.get(name) ?? 0) + value);
      continue;
    }
    if (!buckets.has(name)) buckets.set(name, new Map());
    const of = buckets.get(name), at = bound === '+Inf' ? Infinity : Number(bound);
    of.set(at, (of.get(at) ?? 0) + value);
  }
  return { values, buckets };
}

/** A histogram's mean and 95th percentile of what came between two readings; null where nothing did. */
export function between(earlier, later, name) {
  const grown = (suffix) => (later.values.get(name + suffix) ?? 0) - (earlier.values.get(name + suffix) ?? 0);
  const count = grown('_count');
  if (!(count > 0)) return { mean: null, p95: null };
  const before = earlier.buckets.get(`${name}_bucket`) ?? new Map();
  const counts = [...later.buckets.get(`${name}_bucket`) ?? []].map(([bound, value]) => [bound, value - (before.get(bound) ?? 0)]);
  return { mean: grown('_sum') / count, p95: quantile(counts.sort(([a], [b]) => a - b), 0.95) };
}

/** By Prometheus' rule: linear within a bucket, and of the last, which has no upper bound, its lower one. */
export function quantile(counts, q) {
  const rank = q * (counts.at(-1)?.[1] ?? 0);
  let lower = 0, below = 0;
  for (const [bound, count] of counts) {
    if (count >= rank && count > 0) return bound === Infinity ? lower : lower + (bound - lower) * (rank - below) / (count - below);
    [lower, below] = [bound, count];
  }
  return null;
}
