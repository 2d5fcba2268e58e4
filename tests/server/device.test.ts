import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { NativeAddon } from '../../server/engine/addon.js';
import { chooseDevice } from '../../server/engine/device.js';

const NO_DRIVER = { device: 'cuda:0', reason: 'no NVIDIA driver is installed' };

/** A machine with these devices. */
function machine(usable: string[], unusable: { device: string; reason: string }[] = []): NativeAddon {
  return { devices: () => ({ usable, unusable }) } as unknown as NativeAddon;
}

test('auto takes the GPU where it can compute so, and says why where it does not', () => {
  const gpu = machine(['cuda:0', 'cpu']);
  assert.deepEqual(chooseDevice(gpu, 'auto', 'auto'), { device: 'cuda:0' });
  assert.match(chooseDevice(gpu, 'auto', 'float32').note!, /took the CPU: --compute float32/);
  assert.deepEqual(chooseDevice(machine(['cpu'], [NO_DRIVER]), 'auto', 'auto'), {
    device: 'cpu',
    note: '--device auto took the CPU: no NVIDIA driver is installed.',
  });
});

test('a device that was asked for is taken or refused, never replaced', () => {
  const gpu = machine(['cuda:0', 'cpu'], [{ device: 'cuda:1', reason: 'it is too old' }]);
  assert.deepEqual(chooseDevice(gpu, 'cuda:0', 'auto'), { device: 'cuda:0' });
  assert.deepEqual(chooseDevice(gpu, 'cpu', 'auto'), { device: 'cpu' });
  const refused = (wanted: string, compute: 'auto' | 'float32', words: RegExp): void => {
    assert.throws(() => chooseDevice(gpu, wanted, compute), { name: 'StartupError', message: words });
  };
  refused('cuda:1', 'auto', /--device cuda:1 cannot be used: it is too old; usable here: cuda:0, cpu\./);
  refused('cuda:2', 'auto', /there is no such device/);
  refused('cuda:0', 'float32', /cuda:0 cannot be used: --compute float32 runs on the CPU alone; usable here: cpu\./);
});
