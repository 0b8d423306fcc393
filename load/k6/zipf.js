// Draws k from 0..count-1 with a probability proportional to 1/(k+1)^skew, exactly and without a table: rejection-
// inversion (Hörmann and Derflinger, 1996).

export function zipf(count, skew, random = Math.random) {
  if (skew === 0) {
    return () => Math.floor(random() * count);
  }
  // The integral of x^-skew, and its inverse.
  const area = (x) => (skew === 1 ? Math.log(x) : (x ** (1 - skew) - 1) / (1 - skew));
  const at = (y) => (skew === 1 ? Math.exp(y) : (1 + y * (1 - skew)) ** (1 / (1 - skew)));
  const height = (x) => x ** -skew;

  const from = area(1.5) - 1;
  const to = area(count + 0.5);
  const sure = 2 - at(area(2.5) - height(2));
  return () => {
    for (;;) {
      const y = to + random() * (from - to);
      const x = at(y);
      const k = Math.min(Math.max(Math.round(x), 1), count);
      if (k - x <= sure || y >= area(k + 0.5) - height(k)) {
        return k - 1;
      }
    }
  };
}
