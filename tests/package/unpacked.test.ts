import assert from 'node:assert/strict';
import { copyFileSync, existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { test } from 'node:test';
import { ROOT, inFolder, pack, run } from './pack.js';

/** Packages that an installation of this one has: those of the lock file that are needed to run it. */
function runtimePackages(): string[] {
  const lock = JSON.parse(readFileSync(join(ROOT, 'package-lock.json'), 'utf8')) as {
    packages: Record<string, { dev?: boolean }>;
  };
  return Object.entries(lock.packages)
    .filter(([path, { dev }]) => /^node_modules\/(@[^/]+\/)?[^/]+$/.test(path) && !dev)
    .map(([path]) => path);
}

test('what is packed runs on its own: command, embedding and types, with the packages of an installation alone', async () => {
  await inFolder((folder) => {
    assert.equal(run(ROOT, process.execPath, ['server/setup.mjs', '--no-install', '--prebuild']).status, 0);
    const { archive, files } = pack(folder, '--ignore-scripts');
    for (const path of ['dist/index.d.ts', 'dist/api/openapi.d.ts', 'models/pocket-r1/model.safetensors', 'LICENSE']) {
      assert.ok(files.includes(path), path);
    }
    assert.deepEqual(
      files.filter((path) => /^tests\/|\.py$|^server\/.*\.ts$|stamp|\.env/.test(path)),
      [],
    );

    assert.equal(run(folder, 'tar', ['xzf', archive]).status, 0);
    for (const path of runtimePackages()) {
      mkdirSync(join(folder, dirname(path)), { recursive: true });
      symlinkSync(join(ROOT, path), join(folder, path));
    }
    symlinkSync(join(folder, 'package'), join(folder, 'node_modules/rodin'));
    const node = (...args: string[]) => run(folder, process.execPath, args);

    const main = 'node_modules/rodin/dist/main.js';
    assert.match(node(main, '--version').stdout, /^rodin \d+\.\d+\.\d+\n$/);
    const doctor = node(main, 'doctor');
    assert.equal(doctor.status, 0, doctor.stderr);
    assert.match(doctor.stdout, /addon +\S+\/prebuilds\/\S+\/rodin\.node/);

    for (const [example, answer] of [
      ['embed', /^577 × 63 = \**36351\**\n$/],
      ['server', /^world: .*36351/],
    ] as const) {
      copyFileSync(join(ROOT, `examples/${example}.mjs`), join(folder, `${example}.mjs`));
      const { status, stdout, stderr } = node(`${example}.mjs`);
      assert.equal(status, 0, stderr);
      assert.match(stdout, answer);
    }

    writeFileSync(
      join(folder, 'typed.mts'),
      `import { createEngine, createServer, type ChatCompletion } from 'rodin';
       const engine = await createEngine({ maxNumSeqs: 4, device: 'cpu', cacheMemory: '64MiB' });
       const whole: ChatCompletion = await engine.chat({ messages: [{ role: 'user', content: 'Hi' }], max_tokens: 3 });
       const text: string | null | undefined = whole.choices[0]?.message.content;
       for await (const { choices } of engine.stream({ messages: [] })) choices.map(({ delta }) => delta.content?.length);
       // @ts-expect-error there is no such option
       await createServer({ maxNumSequences: 4 });
       // @ts-expect-error there is no such role
       await engine.chat({ messages: [{ role: 'nobody', content: '' }] });
       export const url: string = text ?? (await (await createServer({ port: 0 })).listen());`,
    );
    for (const name of ['typescript', '@types/node']) {
      mkdirSync(join(folder, dirname(`node_modules/${name}`)), { recursive: true });
      if (!existsSync(join(folder, 'node_modules', name))) {
        symlinkSync(join(ROOT, 'node_modules', name), join(folder, 'node_modules', name));
      }
    }
    const options = ['--noEmit', '--strict', '--module', 'nodenext', '--target', 'es2022', '--types', 'node'];
    const typed = node('node_modules/typescript/bin/tsc', ...options, '--skipLibCheck', 'false', 'typed.mts');
    assert.equal(typed.status, 0, typed.stdout);
  });
});
