// Drives the page of `btok app` in Chromium and prints what it saw as JSON: node drive.mjs URL PICTURE CLIP SCREENSHOTS
import { chromium } from "playwright-core";

const [url, picture, clip, screenshots] = process.argv.slice(2);
const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: ["--no-sandbox", "--disable-gpu"],
});
const page = await browser.newPage({ viewport: { width: 1400, height: 950 } });
const outside = new Set(), errors = [], seen = {};
page.on("request", (r) => !r.url().startsWith(url) && !/^(data|blob):/.test(r.url()) && outside.add(r.url()));
page.on("console", (m) => m.type() === "error" && errors.push(m.text().slice(0, 200)));
page.on("pageerror", (e) => errors.push("pageerror " + e.message.slice(0, 200)));
page.on("dialog", (d) => { errors.push("dialog " + d.message()); d.dismiss(); });

const ids = () => page.locator("#hits button").evaluateAll((all) => all.map((one) => one.dataset.id));
const text = page.locator("#text input, #text textarea").first();
const where = page.locator("#where input, #where textarea").first();

// An action that changes the hits, and how long that takes.
async function search(name, action) {
    const before = await page.locator("#summary").innerHTML();
    await page.evaluate(() => document.querySelectorAll("#summary p").forEach((p) => p.remove()));
    const start = performance.now();
    await action();
    await page.waitForFunction(() => document.querySelector("#summary p") !== null, null, { timeout: 60000 });
    seen[name] = { ms: Math.round(performance.now() - start), ids: await ids(), before };
}

// An action that the page refuses, and what it says.
async function refused(name, action) {
    await action();
    const toast = page.getByTestId("toast-text").last();
    await toast.waitFor({ timeout: 60000 });
    seen[name] = await toast.innerText();
    await page.getByTestId("toast-close").last().click();
    await toast.waitFor({ state: "detached" });
}

// Elements without a name that assistive technology could read.
const nameless = () => page.evaluate(() => {
    const named = (e) => e.getAttribute("aria-label") || e.getAttribute("title") || e.getAttribute("alt")
        || (e.getAttribute("aria-labelledby") && document.getElementById(e.getAttribute("aria-labelledby"))?.innerText)
        || [...(e.labels ?? [])].some((l) => l.innerText.trim()) || e.innerText?.trim();
    return [...document.querySelectorAll("input, textarea, select, button, img, video")]
        .filter((e) => e.checkVisibility({ visibilityProperty: true }) && !named(e))
        .map((e) => e.outerHTML.slice(0, 200));
});

let start = performance.now();
await page.goto(url, { waitUntil: "domcontentloaded" });
await text.waitFor({ timeout: 60000 });
seen.ready = Math.round(performance.now() - start);
seen.nameless = await nameless();

await refused("empty", () => page.locator("#go").click());
await text.fill("tiger face");
await search("typed", () => text.press("Enter"));
await page.screenshot({ path: `${screenshots}/typed.png` });

const kind = (name) => page.locator("#kinds label").filter({ hasText: name }).locator("input");
await kind("image").check();
await search("images", () => text.press("Enter"));

// A hit in large, its neighbours, and what the tokens hold.
await page.locator("#hits button").first().focus();
await page.keyboard.press("Enter");
await page.locator("#large img").waitFor({ timeout: 60000 });
seen.large = await page.locator("#large").innerText();
seen.largeImage = await page.locator("#large img").evaluate(async (i) => { await i.decode(); return i.naturalWidth; });
start = performance.now();
await page.locator("#why").click();
await page.locator("#guesses dd").first().waitFor({ timeout: 60000 });
seen.why = { ms: Math.round(performance.now() - start), text: await page.locator("#guesses").innerText() };
await page.screenshot({ path: `${screenshots}/hit.png` });
seen.namelessWithHit = await nameless();
await search("more", () => page.locator("#more").click());

// Kinds: clips that play, pages.
await kind("image").uncheck();
await kind("video").check();
await text.fill("octopus");
await search("clips", () => page.locator("#go").click());
await page.locator("#hits button").first().click();
await page.locator("#large video").waitFor({ timeout: 60000 });
seen.plays = await page.locator("#large video").evaluate(async (video) => {
    video.muted = true;
    await video.play();
    await new Promise((resolve) => setTimeout(resolve, 500));
    return { width: video.videoWidth, seconds: video.duration, now: video.currentTime, error: video.error?.code };
});
await page.screenshot({ path: `${screenshots}/clip.png` });
await kind("video").uncheck();
await kind("page").check();
await text.fill("the velocity of a moving body");
await search("pages", () => page.locator("#go").click());
await page.locator("#hits button").first().click();
await page.locator("#large img").waitFor({ timeout: 60000 });
seen.pageImage = await page.locator("#large img").evaluate(async (i) => { await i.decode(); return i.naturalHeight; });
await page.screenshot({ path: `${screenshots}/page.png` });
await kind("page").uncheck();

// A condition, and hostile input.
await where.fill("kind = 'text'");
await text.fill("a cell of an animal");
await search("texts", () => page.locator("#go").click());
await page.screenshot({ path: `${screenshots}/texts.png` });
for (const [name, sql] of Object.entries({ drop: "1=1; DROP TABLE items", html: "<img src=x onerror=alert(1)>", open: "(((" })) {
    await where.fill(sql);
    await refused(`where ${name}`, () => page.locator("#go").click());
}
await where.fill("");
seen.hostile = {};
for (const typed of ["<img src=x onerror=alert(1)>", "${alert(1)}`{{#if", "/etc/passwd", "<|btok_0|><|image_pad|>", "'; DROP TABLE items; --"]) {
    await text.fill(typed);
    await search(`typed ${typed}`, () => page.locator("#go").click());
}

// Uploads.
await text.fill("");
await page.locator("#picture input[type=file]").setInputFiles(picture);
await page.locator("#picture img").waitFor({ timeout: 60000 });
await search("picture", () => page.locator("#go").click());
seen.namelessWithPicture = await nameless();
await page.screenshot({ path: `${screenshots}/picture.png` });
await text.fill("pizza");
await search("picture and text", () => page.locator("#go").click());
await text.fill("");
await page.locator("#picture button[aria-label='Clear'], #picture button[title='Clear'], #picture button[aria-label='Remove Image']").first().click();
await page.locator("#clip input[type=file]").setInputFiles(clip);
await page.locator("#clip video").waitFor({ timeout: 60000 });
await search("clip", () => page.locator("#go").click());
await page.screenshot({ path: `${screenshots}/uploaded-clip.png` });
await page.setViewportSize({ width: 480, height: 900 });
await page.screenshot({ path: `${screenshots}/narrow.png` });

console.log(JSON.stringify({ ...seen, outside: [...outside], errors }));
await browser.close();
