/** Images in a storage of their own, through buildah, which needs no engine. */
import { spawnSync } from 'node:child_process';
import { copyFileSync, existsSync, mkdirSync, readFileSync, realpathSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

const ENV = { ...process.env, BUILDAH_ISOLATION: 'chroot' };

/** overlay shares layers; where file systems do not stack, STORAGE_DRIVER=vfs copies them. */
const DRIVER = process.env.STORAGE_DRIVER ?? 'overlay';

/** What a container is started with, as the image says it. */
export interface ImageConfig {
  User: string;
  Env: string[];
  Entrypoint: string[];
  Cmd: string[];
  WorkingDir: string;
  Labels: Record<string, string>;
  Healthcheck: { Test: string[] };
  ExposedPorts: Record<string, object>;
}

/** Runs a command with its output shown; throws where it fails. */
export function run(command: string, ...args: string[]): void {
  const { status, error } = spawnSync(command, args, { stdio: ['ignore', 'inherit', 'inherit'], env: ENV });
  if (status !== 0)
    throw new Error(`\`${[command, ...args].join(' ')}\` failed: ${error?.message ?? `exit ${status}`}`);
}

function read(command: string, ...args: string[]): string {
  const { status, stdout, error } = spawnSync(command, args, {
    stdio: ['ignore', 'pipe', 'inherit'],
    env: ENV,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
  });
  if (status !== 0)
    throw new Error(`\`${[command, ...args].join(' ')}\` failed: ${error?.message ?? `exit ${status}`}`);
  return stdout.trim();
}

export class Storage {
  readonly folder: string;
  readonly #flags: string[];

  constructor(folder: string) {
    this.folder = folder;
    const [root, runRoot] = [join(folder, 'storage'), join(folder, 'run')];
    this.#flags = ['--root', root, '--runroot', runRoot, '--storage-driver', DRIVER];
  }

  /** Sentences about what is missing on this machine; none: all is there. */
  static missing(withStandIns: boolean): string[] {
    const tools = ['buildah', 'unshare', 'chroot', 'mount', ...(withStandIns ? ['debootstrap'] : [])];
    const missing = tools.filter((tool) => spawnSync('which', [tool]).status !== 0);
    return [
      ...(missing.length ? [`${missing.join(', ')} not found: apt-get install buildah debootstrap util-linux`] : []),
      ...(process.getuid?.() === 0 ? [] : ['this script mounts file systems: run it as root']),
    ];
  }

  build(target: string, tag: string, context: string): void {
    run('nice', 'buildah', ...this.#flags, 'bud', '--format', 'docker', '--target', target, '-t', tag, context);
  }

  /** An image that holds a folder's files and, where there is one, a base. */
  commit(tag: string, content: readonly [from: string, to: string][], base = 'scratch', env: string[] = []): void {
    const container = read('buildah', ...this.#flags, 'from', '--pull-never', base);
    for (const [from, to] of content) run('buildah', ...this.#flags, 'add', '--quiet', container, from, to);
    for (const variable of env) run('buildah', ...this.#flags, 'config', '--env', variable, container);
    run('buildah', ...this.#flags, 'commit', '--quiet', '--rm', container, tag);
  }

  config(tag: string): ImageConfig {
    const inspected = JSON.parse(read('buildah', ...this.#flags, 'inspect', '--type', 'image', tag)) as {
      Docker: { config: ImageConfig };
    };
    return inspected.Docker.config;
  }

  /** The root file system of a new container of an image. */
  mount(tag: string): string {
    const container = read('buildah', ...this.#flags, 'from', '--pull-never', tag);
    return read('buildah', ...this.#flags, 'mount', container);
  }

  /** Takes away all containers and their mounts; images stay. */
  removeContainers(): void {
    run('buildah', ...this.#flags, 'rm', '--all');
  }

  /** Bytes that somebody pulls: the compressed layers. */
  compressedBytes(tag: string): number {
    const folder = join(this.folder, 'pushed');
    rmSync(folder, { recursive: true, force: true });
    run('buildah', ...this.#flags, 'push', '--quiet', '--format', 'oci', tag, `oci:${folder}:image`);
    const blob = (digest: string) => readFileSync(join(folder, 'blobs', ...digest.split(':')), 'utf8');
    const index = JSON.parse(readFileSync(join(folder, 'index.json'), 'utf8')) as { manifests: { digest: string }[] };
    const manifest = JSON.parse(blob(index.manifests[0]!.digest)) as { layers: { size: number }[] };
    return manifest.layers.reduce((sum, { size }) => sum + size, 0);
  }
}

/**
 * Images under the names that the Dockerfile's FROM asks for, made of this machine's Debian mirror, Node, npm and CUDA
 * toolkit: for machines that reach no registry of images.
 */
export function makeStandIns(storage: Storage, args: Map<string, string>, cudaFolder: string | null): void {
  const root = join(storage.folder, 'debian');
  if (!existsSync(root)) run('nice', 'debootstrap', '--variant=minbase', 'bookworm', root);
  storage.commit(args.get('BASE_IMAGE')!, [[root, '/']]);

  // The authorities that this machine trusts: its way to the package registry may lead through one of its own.
  const authorities = process.env.NODE_EXTRA_CA_CERTS;
  const own = join(storage.folder, 'node');
  mkdirSync(own, { recursive: true });
  writeFileSync(join(own, 'npm'), '#!/bin/sh\nexec node /usr/local/lib/npm/bin/npm-cli.js "$@"\n', { mode: 0o755 });
  if (authorities) copyFileSync(authorities, join(own, 'authorities.pem'));
  const npmCli = process.env.npm_execpath ?? realpathSync(read('which', 'npm'));
  storage.commit(
    args.get('NODE_IMAGE')!,
    [
      [realpathSync(process.execPath), '/usr/local/bin/node'],
      [join(own, 'npm'), '/usr/local/bin/npm'],
      [dirname(dirname(npmCli)), '/usr/local/lib/npm'],
      ...(authorities ? ([[join(own, 'authorities.pem'), '/authorities.pem']] as [string, string][]) : []),
    ],
    args.get('BASE_IMAGE'),
    authorities ? ['NODE_EXTRA_CA_CERTS=/authorities.pem'] : [],
  );
  if (cudaFolder) storage.commit(args.get('CUDA_IMAGE')!, [[cudaFolder, cudaFolder]]);
}
