import { StartupError } from '../errors.js';
import type { ComputeMode, NativeAddon } from './addon.js';

export interface DeviceChoice {
  device: string;
  /** where 'auto' did not take the first device of this machine: what it took, and why */
  note?: string;
}

/** The device to run on: the one that was asked for, or on 'auto' the best one that can compute so. */
export function chooseDevice(addon: NativeAddon, wanted: string, compute: ComputeMode): DeviceChoice {
  const { usable, unusable } = addon.devices();
  const reasonAgainst = (device: string): string | null => {
    return device === 'cpu' || compute === 'auto' ? null : `--compute ${compute} runs on the CPU alone`;
  };
  if (wanted === 'auto') {
    const device = usable.find((name) => reasonAgainst(name) === null)!;
    if (device !== 'cpu') return { device };
    const reasons = usable[0] === 'cpu' ? unusable.map(({ reason }) => reason) : [reasonAgainst(usable[0]!)!];
    return { device, note: `--device auto took the CPU: ${reasons.join('; ')}.` };
  }
  const reason = usable.includes(wanted)
    ? reasonAgainst(wanted)
    : (unusable.find((entry) => entry.device === wanted)?.reason ?? 'there is no such device');
  if (reason === null) return { device: wanted };
  const others = usable.filter((device) => device !== wanted && reasonAgainst(device) === null);
  throw new StartupError(`--device ${wanted} cannot be used: ${reason}; usable here: ${others.join(', ')}.`);
}
