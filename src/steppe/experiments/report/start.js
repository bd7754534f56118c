// Everything that a script does on this page begins here.
document.documentElement.classList.add("scripted");
curves();
measures();
spectra();
landscapes();
choices();
chips();
theme();
