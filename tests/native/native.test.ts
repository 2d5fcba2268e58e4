import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import test from 'node:test';

const PROGRAM = fileURLToPath(new URL('../../build/rodin_native_tests', import.meta.url));

test('the native tests pass', async () => {
  const { code, output } = await new Promise<{ code: number | string | null; output: string }>((resolve) => {
    execFile(PROGRAM, { maxBuffer: 1 << 26 }, (error, stdout, stderr) => {
      resolve({ code: error ? (error.code ?? error.signal ?? 1) : 0, output: stdout + stderr });
    });
  });
  assert.equal(code, 0, `${PROGRAM} ended with ${code}:\n${output}`);
  assert.match(output, /^[1-9]\d* passed, 0 failed$/m);
});
