/** What of the machine this process may use: in a container that is less than what the machine has. */
import { readFileSync } from 'node:fs';
import { availableParallelism, freemem } from 'node:os';

/** Where Linux says what a control group may use, versions 2 and 1. */
const CPU_MAX = '/sys/fs/cgroup/cpu.max';
const CPU_QUOTA = '/sys/fs/cgroup/cpu/cpu.cfs_quota_us';
const CPU_PERIOD = '/sys/fs/cgroup/cpu/cpu.cfs_period_us';

/** Cores that this process may keep busy: those it may run on, and no more than its share of time pays for. */
export function usableCores(read: (path: string) => string | null = readOrNull): number {
  const share = cpuShare(read);
  const cores = availableParallelism();
  // Part of a core is of use to nobody: threads that wait for each other would stall at the end of each period.
  return share === null ? cores : Math.max(1, Math.min(cores, Math.floor(share)));
}

/** Bytes of memory that this process can still take. */
export function usableMemory(): number {
  return Math.min(freemem(), process.availableMemory());
}

/** Cores' worth of time that the control group gets; null: as much as there is. */
function cpuShare(read: (path: string) => string | null): number | null {
  const [quota, period] = read(CPU_MAX)?.trim().split(' ') ?? [read(CPU_QUOTA)?.trim(), read(CPU_PERIOD)?.trim()];
  const share = Number(quota) / Number(period);
  return share > 0 && Number.isFinite(share) ? share : null;
}

function readOrNull(path: string): string | null {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return null;
  }
}
