// Two languages share one site: a page shows its own language's part of the menu, and the switch leads to the same page.
(function () {
  const path = location.pathname;
  const chinese = /\/zh\/[^/]*$|\.zh-CN\.html$/.test(path);
  const root = new URL(JSON.parse(document.getElementById("__config").textContent).base + "/", location.href);
  const inOther = (link) => /\/zh\/|\.zh-CN\.html/.test(link.href) !== chinese;

  if (chinese) document.documentElement.lang = "zh";
  document.querySelectorAll(".md-nav--primary > .md-nav__list > .md-nav__item").forEach((item) => {
    const links = [...item.querySelectorAll("a[href]")].filter((link) => !link.hash);
    if (links.length && links.every(inOther)) item.style.display = "none";
  });

  const page = path.split("/").pop() || "index.html";
  const pair = (name) => (name === "errors.html" ? "errors.zh-CN.html" : "zh/" + name);
  const there = chinese ? page.replace(".zh-CN", "") : pair(page);
  document.querySelectorAll(".md-select__link").forEach((link) => {
    const toChinese = link.hreflang === "zh";
    const known = document.querySelector(`.md-nav--primary a[href$="${there}"]`);
    if (toChinese !== chinese && known) link.href = new URL(there, root).href;
  });
})();
