// The ids of load/generate.py, by user number.

const FIRST = 1_000_000_000_000;

// A bijection of 32-bit numbers that separates neighbours: the finalizer of MurmurHash3.
function mixed(n) {
  n = Math.imul(n ^ (n >>> 16), 0x85ebca6b);
  n = Math.imul(n ^ (n >>> 13), 0xc2b2ae35);
  return (n ^ (n >>> 16)) >>> 0;
}

const hex = (n) => n.toString(16).padStart(8, "0");

function uuid(user) {
  const [a, b, c, d] = [0, 1, 2, 3].map((word) => mixed(user * 4 + word));
  const version4 = ((b & 0x0fff) | 0x4000).toString(16);
  const variant = ((c >>> 16) & 0x3fff) | 0x8000;
  return `${hex(a)}-${hex(b).slice(0, 4)}-${version4}-${variant.toString(16)}-${hex(c).slice(4)}${hex(d)}`;
}

const KINDS = {
  sequential: (user) => (user % 1000 === 7 ? `${FIRST + user}, "ж"` : `${FIRST + user}`),
  numeric: (user) => `${FIRST + mixed(user)}`,
  uuid,
};

export function idOf(kind) {
  if (!KINDS[kind]) {
    throw new Error(`IDS=${kind}: give one of ${Object.keys(KINDS).join(", ")}`);
  }
  return KINDS[kind];
}
