import assert from 'node:assert/strict';
import { test } from 'node:test';
import type { NativeAddon } from '../../server/engine/addon.js';
import { chooseDevice } from '../../server/engine/device.js';

const NO_DRIVER = { device: 'cuda:0', reason: 'no NVIDIA driver is installed' };

/** A machine with these devices. */
function machine(usable: string[], unusable: { device: string; reason: string }[] = []): NativeAddon {
  return { devices: () => ({ usable, unusable }) } as unknown as NativeAddon;
}

const V3 = { modelType: 'deepseek_v3' as const };
const LLAMA = { modelType: 'llama' as const };

test('auto takes the GPU where it can run the model, and says why where it does not', () => {
  const gpu = machine(['cuda:0', 'cpu']);
  assert.deepEqual(chooseDevice(gpu, 'auto', V3, 'auto'), { device: 'cuda:0' });
  assert.deepEqual(chooseDevice(gpu, 'auto', LLAMA, 'auto'), {
    device: 'cpu',
    note: '--device auto took the CPU: a checkpoint of type llama (grouped-query attention) runs on the CPU alone.',
  });
  assert.match(chooseDevice(gpu, 'auto', V3, 'float32').note!, /took the CPU: --compute float32/);
  assert.deepEqual(chooseDevice(machine(['cpu'], [NO_DRIVER]), 'auto', V3, 'auto'), {
    device: 'cpu',
    note: '--device auto took the CPU: no NVIDIA driver is installed.',
  });
});

test('a device that was asked for is taken or refused, never replaced', () => {
  const gpu = machine(['cuda:0', 'cpu'], [{ device: 'cuda:1', reason: 'it is too old' }]);
  assert.deepEqual(chooseDevice(gpu, 'cuda:0', V3, 'auto'), { device: 'cuda:0' });
  assert.deepEqual(chooseDevice(gpu, 'cpu', V3, 'auto'), { device: 'cpu' });
  const refused = (wanted: string, model: typeof V3 | typeof LLAMA, words: RegExp): void => {
    assert.throws(() => chooseDevice(gpu, wanted, model, 'auto'), { name: 'StartupError', message: words });
  };
  refused('cuda:1', V3, /--device cuda:1 cannot be used: it is too old; usable here: cuda:0, cpu\./);
  refused('cuda:2', V3, /there is no such device/);
  refused('cuda:0', LLAMA, /cuda:0 cannot be used: .*grouped-query attention.*; usable here: cpu\./);
});
