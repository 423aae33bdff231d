// npm stable-diffusion-api 0.0.7, pictures through sharp. Every check runs, even if one fails; then each method must have been used.

const { StableDiffusionApi, ControlNetApi } = require("stable-diffusion-api");
const sharp = require("sharp");

const target = new StableDiffusionApi({ baseUrl: process.env.SDGEN_BASE_URL, timeout: 600000, defaultStepCount: 2 });
const used = new Set();
const watch = (object, prefix) =>
  new Proxy(object, {
    get(whole, name) {
      used.add(prefix + String(name));
      return whole[name];
    },
  });
const api = watch(target, "");
const controlNet = watch(target.ControlNet, "ControlNet.");
const failed = [];

async function check(name, run) {
  try {
    await run();
    console.log("ok:", name);
  } catch (error) {
    failed.push(name);
    console.log("FAILED:", name, error.response ? [error.response.status, error.response.data] : error);
  }
}

function equal(got, want) {
  if (JSON.stringify(got) !== JSON.stringify(want)) throw new Error(`got ${JSON.stringify(got)}, want ${JSON.stringify(want)}`);
}

const size = async (image) => {
  const { width, height } = await image.metadata();
  return [width, height];
};

async function refused(promise, ...statuses) {
  let status;
  try {
    status = (await promise).response.status;
  } catch (error) {
    status = error.response.status;
  }
  if (!statuses.includes(status)) throw new Error(`answered ${status}`);
}

const small = { prompt: "a red apple", width: 128, height: 128, seed: 1 };

async function main() {
  await api.waitForReady(0.1);
  const made = (await api.txt2img(small)).image;

  await check("a batch of pictures is made", async () => {
    const result = await api.txt2img({ ...small, n_iter: 2 });
    equal(result.images.length, 2);
    equal(JSON.parse(result.info).all_seeds, [1, 2]);
    equal(await size(result.image), [128, 128]);
    equal(await result.image.raw().toBuffer().then((b) => b.equals(b)), true);
  });
  await check("a picture is changed and painted into", async () => {
    const changed = await api.img2img({ ...small, init_images: [made], denoising_strength: 0.5 });
    equal(await size(changed.image), [128, 128]);
    const white = { create: { width: 64, height: 64, channels: 3, background: "white" } };
    const black = sharp({ create: { width: 128, height: 128, channels: 3, background: "black" } });
    const mask = sharp(await black.composite([{ input: await sharp(white).png().toBuffer() }]).png().toBuffer());
    const painted = await api.img2img({ ...small, init_images: [made], mask_image: mask, inpaint_full_res: 0 });
    equal(await size(painted.image), [128, 128]);
  });
  await check("a picture is enlarged", async () => {
    equal(await size((await api.extraSingle({ image: made, upscaler_1: "Lanczos" })).image), [256, 256]);
  });
  await check("a batch under the client's own field name is refused", async () => {
    // It sends `image_list` of `image`; the route reads `imageList` of `data`.
    await refused(api.extraBatch({ images: [made], name_list: ["a"], upscaler_1: "Lanczos" }), 422);
  });
  await check("a picture tells how it was made", async () => {
    equal((await api.pngInfo(made)).info.split("\n")[0], "a red apple");
  });
  await check("captions are refused", async () => {
    await refused(api.interrogate(made, "clip"), 404, 501);
  });
  await check("lists are lists", async () => {
    const lists = ["getSamplers", "getUpscalers", "getSdModels", "getHypernetworks", "getFaceRestorers", "getRealesrganModels",
      "getPromptStyles"];
    for (const name of lists) equal(Array.isArray(await api[name]()), true);
    equal((await api.getProgress()).state.job_count, 0);
    equal((await api.getProgress(true)).current_image, null);
    equal(typeof (await api.getCmdFlags()), "object");
    await api.refreshCheckpoints();
  });
  await check("options are kept", async () => {
    equal(await api.setOptions({ send_seed: false }), null);
    equal((await api.getOptions()).send_seed, false);
    await api.setOptions({ send_seed: true });
    equal(await api.getCurrentModel(), (await api.getSdModels())[0].title);
  });
  await check("credentials are ignored where none are needed", async () => {
    equal((await api.setAuth("nobody", "nothing").getProgress()).progress, 0);
  });
  await check("controlnet lists and refuses", async () => {
    equal(Array.isArray(await controlNet.getModels()), true);
    equal(Array.isArray(await controlNet.getModules()), true);
    await refused(controlNet.detect({ controlnet_input_images: [made], controlnet_module: "no such module" }), 422);
  });

  // setModel reads a key `name` that entries of sd-models do not have.
  const broken = ["setModel"];
  const methods = [
    ...Object.getOwnPropertyNames(StableDiffusionApi.prototype),
    ...Object.getOwnPropertyNames(ControlNetApi.prototype).map((name) => `ControlNet.${name}`),
  ].filter((name) => !name.endsWith("constructor"));
  const unused = methods.filter((name) => !used.has(name) && !broken.includes(name));
  if (unused.length) failed.push(`methods never called: ${unused}`);
  console.log(`${methods.length - unused.length - broken.length} of ${methods.length} methods called; broken in the client: ${broken}`);
  for (const name of failed) console.log("FAILED:", name);
  process.exit(failed.length ? 1 : 0);
}

main();
