import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { toF16, toQ8, writeGguf } from './gguf.js';

function fromF16(bits: number): number {
  const exponent = bits >> 10;
  return exponent === 0 ? (bits & 1023) * 2 ** -24 : (1 + (bits & 1023) / 1024) * 2 ** (exponent - 15);
}

test('every f16 is its own nearest, and what lies between goes to the nearer', () => {
  for (let bits = 0; bits < 0x7bff; bits++) {
    const value = fromF16(bits);
    const step = fromF16(bits + 1) - value;
    assert.equal(toF16(value), bits);
    assert.equal(toF16(value + 0.49 * step), bits);
    assert.equal(toF16(value + 0.51 * step), bits + 1);
  }
});

test('Q8_0 is within half a step of every value', () => {
  const values = Float32Array.from({ length: 320 }, (_, i) => Math.sin(i * i) * 10 ** (i % 5));
  const bytes = toQ8(values);
  assert.equal(bytes.length, 340);
  for (let block = 0; block < 10; block++) {
    const scale = fromF16(bytes.readUInt16LE(block * 34));
    for (let i = 0; i < 32; i++) {
      const error = Math.abs(bytes.readInt8(block * 34 + 2 + i) * scale - values[block * 32 + i]!);
      // half a step, and the rounding of the scale
      assert.ok(error <= scale * (0.5 + 127 * 2 ** -11), `${error} of ${scale}`);
    }
  }
});

test('a file has its header, its metadata and its tensors at aligned places', () => {
  const folder = mkdtempSync(join(tmpdir(), 'rodin-gguf-'));
  try {
    const file = join(folder, 'a.gguf');
    const first = Float32Array.of(1, -2, 3.14159274);
    const metadata = new Map([['a.key', { string: 'text' }]]);
    writeGguf(file, metadata, [
      { name: 'one', type: 'F32', shape: [3], values: () => [first] },
      { name: 'two', type: 'BF16', shape: [1, 2], values: () => [first.subarray(1)] },
    ]);
    const bytes = readFileSync(file);
    assert.equal(bytes.toString('latin1', 0, 4), 'GGUF');
    assert.deepEqual([bytes.readUInt32LE(4), bytes.readBigUInt64LE(8), bytes.readBigUInt64LE(16)], [3, 2n, 1n]);
    // magic, version, counts; key, type, string; name, dimensions, type, offset of both tensors
    const header = 24 + (8 + 5 + 4 + 8 + 4) + (8 + 3 + 4 + 8 + 4 + 8) + (8 + 3 + 4 + 16 + 4 + 8);
    const data = Math.ceil(header / 32) * 32;
    assert.equal(bytes.readBigUInt64LE(header - 8), 32n);
    assert.deepEqual(
      [0, 4, 8].map((at) => bytes.readFloatLE(data + at)),
      [...first],
    );
    assert.deepEqual([bytes.readUInt16LE(data + 32), bytes.readUInt16LE(data + 34)], [0xc000, 0x4049]);
    assert.equal(bytes.length, data + 64);
    const short = { name: 'short', type: 'F32' as const, shape: [4], values: () => [first] };
    assert.throws(() => writeGguf(file, metadata, [short]), /short has 4 values, 3 came/);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
