/** Digits of an integer that a JavaScript number cannot hold exactly, where the request gave one as `seed`. */
export const SEED_SOURCE = Symbol('seed source');

export type JsonBody = Record<string, unknown> & { [SEED_SOURCE]?: string };

/** Keeps the exact digits of a 64-bit seed, which JSON.parse rounds. `raw` is valid JSON that parsed to `body`. */
export function keepSeedSource(body: unknown, raw: string): void {
  if (typeof body !== 'object' || body === null || Array.isArray(body)) return;
  const seed = (body as JsonBody)['seed'];
  if (typeof seed !== 'number' || Number.isSafeInteger(seed)) return;
  const source = lastTopLevelNumber(raw, 'seed');
  if (source !== null) Object.defineProperty(body, SEED_SOURCE, { value: source, enumerable: false });
}

/** Text of the number that the outermost object gives for `key`; of several, the last, as JSON.parse does. */
function lastTopLevelNumber(raw: string, key: string): string | null {
  let depth = 0;
  let found: string | null = null;
  let isWanted = false;
  const tokens = /"[^"\\]*(?:\\.[^"\\]*)*"|[{}[\]:,]|[-\d.eE+]+|[a-z]+/g;
  for (const match of raw.matchAll(tokens)) {
    const token = match[0];
    if (token === '{' || token === '[') depth++;
    else if (token === '}' || token === ']') depth--;
    else if (depth !== 1 || token === ':') continue;
    else if (token === ',') isWanted = false;
    else if (isWanted) found = token;
    else isWanted = token[0] === '"' && JSON.parse(token) === key;
  }
  return found;
}
